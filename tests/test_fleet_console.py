"The campaign console: on a screen and on paper, with names nobody should trust."
import re
import numpy as np
import pytest
from edgenb.core import EdgenbError
from edgenb.fleet.console import SIGNS, Board, board_of, board_of_log, console, exposure_figure, in_words, map_html
from edgenb.fleet.simulate import installs, rehearse
from edgenb.fleet.world import STATES, World

EVIL = '<script>alert(1)</script>'


@pytest.fixture(scope='module')
def rehearsal(): return rehearse(World(devices=80, plants=4, worse_on=('rb5',), unhealthy=0.6), 1, installs)


def board(looks=4, **kw):
    grid = np.zeros((looks, 2, 1, 8), int)
    grid[..., 0] = 20; grid[1:, 0, 0, 0] = 15; grid[1:, 0, 0, 5] = 5
    return Board(**{'title': '40 devices', 'simulated': False, 'sites': ['Ulm', 'Gera'], 'hardware': ['orin'], 'hours': list(range(looks)), 'grid': grid, 'state': ['running']*looks, 'stage': [12.5]*looks, 'exposed': [0.0] + [0.125]*(looks - 1),
                    'figures': {'evidence that it is worse': [(h, 2.0*h, 20.0) for h in range(looks)]}} | kw)


def text_of(html): return re.sub(r'<[^>]*>', ' ', html)


def test_nothing_that_a_plant_a_reason_or_an_alert_is_called_becomes_markup():
    b = board(title=EVIL, sites=[EVIL, 'b'], hardware=[EVIL], figures={EVIL: [(1, 1.0, 2.0)]}, log=[{'hour': 0, 'action': EVIL, 'reason': EVIL}], alerts=[{'hour': 0, 'where': EVIL, 'what': EVIL}], state=[EVIL]*4)
    panel = console(b, act=lambda action, reason: EVIL)
    panel.box
    panel.parts['reason'].value = EVIL
    panel.parts['pause'].click()
    shown = panel.html() + ''.join(panel.parts[p].value for p in ('status', 'signed', 'view', 'guards'))
    assert '<script' not in shown and shown.count('&lt;script&gt;') >= 10


def test_the_page_without_a_kernel_says_all_that_the_screen_does(rehearsal):
    page = console(rehearsal).html()
    for words in ('Simulated.', 'new model', 'refuse the release', 'decisions', 'failed installs', 'over its boundary'): assert words in page, words
    assert page.count('<img alt="') == 2 and 'role="group"' in page and '<script' not in page


def test_a_device_is_counted_once_on_the_map_and_every_state_has_a_sign_of_its_own(rehearsal):
    b = board_of(rehearsal)
    for look in (0, len(b.hours)//2, len(b.hours) - 1):
        said = text_of(map_html(b, look))
        assert sum(int(n) for words in (w for _, _, w in SIGNS.values()) for n in re.findall(rf'(\d+) {words}', said)) == 80
    assert len({s for s, _, _ in SIGNS.values()}) == len(SIGNS) == len(STATES)


def test_the_slider_goes_back_in_time_and_stays_short(rehearsal):
    panel = console(rehearsal)
    panel.box
    assert len(panel.parts['look'].options) <= 220
    last = panel.parts['view'].value
    panel.parts['look'].value = 0
    assert panel.parts['view'].value != last and '0.0% ever exposed' in panel.parts['status'].value and 'promote' not in panel.parts['view'].value


def test_without_somebody_who_signs_the_buttons_are_off():
    panel = console(board())
    panel.box
    assert panel.parts['pause'].disabled and panel.parts['roll back'].disabled


def test_an_action_wants_a_reason_once_and_shows_what_was_signed():
    asked = []
    panel = console(board(), act=lambda action, reason: asked.append((action, reason)) or {'serial': 8, 'reason': reason})
    panel.box
    panel.parts['roll back'].click(); panel.parts['reason'].value = '   '; panel.parts['roll back'].click()
    assert asked == [] and 'Why?' in panel.parts['status'].value
    panel.parts['reason'].value = ' line 3 stands '
    panel.parts['roll back'].click()
    assert asked == [('roll back', 'line 3 stands')] and '&quot;serial&quot;: 8' in panel.parts['signed'].value and 'Done: roll back' in panel.parts['status'].value and panel.parts['reason'].value == ''
    panel.parts['pause'].click()
    assert len(asked) == 1      # the reason of one action is not that of the next


def test_what_cannot_be_done_is_said_and_the_reason_is_kept():
    def act(action, reason): raise EdgenbError('campaign c-7 is over: it was rolled back')
    panel = console(board(), act=act)
    panel.box
    panel.parts['reason'].value = 'because'
    panel.parts['pause'].click()
    assert 'Not done: campaign c-7 is over' in panel.parts['status'].value and panel.parts['reason'].value == 'because' and panel.parts['signed'].value == ''


def test_a_running_campaign_is_read_anew_after_an_action_and_on_request():
    boards = [board(2), board(3), board(4, state=['running']*3 + ['rolled-back'])]
    read = iter(boards)
    panel = console(lambda: next(read), act=lambda action, reason: 'signed')
    panel.box
    assert 'Hour 1: running' in panel.parts['status'].value
    panel.parts['refresh'].click()
    assert 'Hour 2: running' in panel.parts['status'].value
    panel.parts['reason'].value = 'because'
    panel.parts['roll back'].click()
    assert 'Hour 3: rolled-back' in panel.parts['status'].value


def test_controls_have_names_for_those_who_do_not_see_them():
    panel = console(board(), act=lambda *a: '')
    panel.box
    assert all(panel.parts[p].description and panel.parts[p].tooltip for p in ('look', 'guard', 'reason', 'refresh', 'pause', 'roll back'))
    assert "role='status' aria-live='polite'" in panel.parts['status'].value and 'alt="Share of the fleet' in panel.parts['view'].value


def test_a_large_fleet_has_a_small_page():
    grid = np.random.default_rng(0).multinomial(30_000, np.full(8, 1/8), (2, 12, 3))
    b = board(2, sites=[f'p{i}' for i in range(12)], hardware=['a', 'b', 'c'], grid=grid)
    assert len(map_html(b, 1)) < 60_000 and 'stands for up to 1,250 devices' in map_html(b, 1)


@pytest.mark.parametrize('wrong, says', [({'hours': []}, 'nobody has looked'), ({'sites': ['one']}, 'grid has the shape'), ({'state': []}, '0 entries of state')])
def test_a_board_that_does_not_fit_together_is_refused(wrong, says):
    with pytest.raises(EdgenbError, match=says): board(**wrong)


def test_a_rehearsal_without_pictures_says_how_to_get_them():
    with pytest.raises(EdgenbError, match='pictures=True'): console(rehearse(World(devices=20, plants=2), 0, installs, pictures=False)).html()


# ---- a real campaign, from the controller's log

@pytest.fixture
def real(tmp_path):
    "A campaign that a controller has looked at for two days; its reports come from a simulated fleet. (folder, what was signed)"
    from edgenb.fleet.campaign import policy
    from edgenb.fleet.cohorts import cohort
    from edgenb.fleet.controller import begin as begin_log, step
    from edgenb.fleet.reports import begin_stage, collect, evidence, minute
    from edgenb.fleet.simulate import begin
    from edgenb.fleet.world import advance, publish
    world, p, signed = World(change=0.03), policy(340), []
    d, r, c, inventory = begin(world, 7, p)
    asked, folder = cohort(inventory, c.to_dict()), begin_log(tmp_path, c, p, inventory, signed.append, now=int(minute(0))).folder
    publish(d, asked)
    while not signed[-1].over:
        advance(d, d.now + 1.0); collect(r, d)
        step(folder, lambda *_: evidence(r, d, asked), signed.append, now=int(minute(d.now)))
    return folder, signed, rehearse(world, 7)


def test_the_controller_with_its_log_decides_what_was_rehearsed(real):
    folder, signed, rehearsal = real
    assert (signed[-1].state, signed[-1].reason, signed[-1].cutoffs) == (rehearsal.campaign.state, rehearsal.campaign.reason, rehearsal.campaign.cutoffs)
    from edgenb.fleet.controller import replay
    assert replay(folder) == []


def test_the_console_of_a_real_campaign_shows_its_log(real):
    folder, signed, rehearsal = real
    b = board_of_log(folder)
    assert not b.simulated and b.grid.sum((1, 2, 3)).tolist() == [340]*len(b.hours) and b.state[-1] == 'rolled-back' and b.hours[-1] == rehearsal.outcome['hours']
    mine = board_of(rehearsal)
    look = mine.hours.index(b.hours[-2])
    for s, site in enumerate(b.sites):     # the same devices on the new model, site by site, as far as they have reported
        assert b.grid[-2, s, :, STATES.index('new')].sum() <= mine.grid[look, mine.sites.index(site), :, STATES.index('new')].sum()
    assert b.figures['labels'][-1][1] >= b.figures['labels'][-1][2] and 'Simulated' not in console(folder).html()


def by_hand(tmp_path, *actions, stages=(50, 100)):
    "A campaign of one look, in which nobody has the release yet, and what a person did after that. Its folder"
    from edgenb.fleet.campaign import policy, start
    from edgenb.fleet.cohorts import cohort
    from edgenb.fleet.controller import act, begin, step
    from edgenb.fleet.sequential import NEITHER, Evidence
    devices = [{'id': f'd{i}', 'site': f'plant-{1 + i}', 'hardware': 'orin'} for i in range(10)]
    c, zero = start(devices, 'wafer', 'a'*64, 'b'*64, stages), np.zeros(10, int)
    folder = begin(tmp_path, c, policy(10), devices, lambda c: True, now=0).folder
    step(folder, lambda *_: Evidence(0, 1, np.array([f"{d['site']}/orin" for d in devices]), np.full(10, NEITHER), cohort(devices, c.to_dict()), zero, zero, zero, zero, zero), lambda c: True, now=1)
    for n, action in enumerate(actions): act(folder, action, 'because', lambda c: False, now=60*(n + 2))
    return folder


def test_the_console_shows_where_a_campaign_is_after_its_last_event_and_of_which_look_its_devices_are(tmp_path):
    b = board_of_log(by_hand(tmp_path, 'promote', 'promote'))
    assert in_words(b, 0).startswith('Hour 3: complete, 100 % of the fleet asked; the look of hour 0 (1970-01-01 00:01 UTC): 0 of 10 devices')
    assert b.sites == [f'plant-{n}' for n in range(1, 11)] and b.grid[0].sum((0, 1))[STATES.index('fetching')] > 0
    assert exposure_figure(b, 0).layout.yaxis.range == (0, 5)


def test_after_a_rollback_nobody_is_on_the_way_to_the_release(tmp_path):
    b = board_of_log(by_hand(tmp_path, 'rollback'))
    assert b.state == ['rolled-back'] and b.grid[0].sum((0, 1))[STATES.index('old')] == 10


def test_the_folder_above_says_which_campaigns_are_in_it_and_a_notebook_prints_no_long_panel(tmp_path):
    panel = console(by_hand(tmp_path).parent)
    with pytest.raises(EdgenbError, match=r"holds the campaigns wafer-aaaaaaaa: name one, console\('.*/wafer-aaaaaaaa'\)"): panel.html()
    assert repr(panel) == "Panel('campaign console')"


def test_a_campaign_that_nobody_looked_at_yet_says_what_to_do(tmp_path):
    from edgenb.fleet.campaign import policy, start
    from edgenb.fleet.controller import begin as begin_log
    devices = [{'id': f'd{i}', 'site': 'Ulm', 'hardware': 'orin'} for i in range(40)]
    folder = begin_log(tmp_path, start(devices, 'wafer', 'a'*64, 'b'*64), policy(40), devices, lambda c: None).folder
    with pytest.raises(EdgenbError, match='has not looked at campaign wafer-aaaaaaaa yet'): console(folder).html()
