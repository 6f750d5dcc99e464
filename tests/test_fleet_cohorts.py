"Cohorts: exact, nested, nowhere empty, and a device comes to the same answer as the controller."
import json, subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from edgenb.core import EdgenbError
from edgenb.fleet.cohorts import ALL, cohort, cutoffs, quotas, rank, ranks, strata_of, takes_part

STRATA = ['site', 'hardware']

def fleet(n, sites=12, kinds=('orin', 'pi', 'nano'), odd=0):
    return [{'id': f'cam-{i + odd}', 'site': f's{i % sites}', 'hardware': kinds[i//sites % len(kinds)]} for i in range(n)]

def campaign(devices, seed, share): return {'seed': seed, 'strata': STRATA, 'cutoffs': cutoffs(devices, seed, share)}

fleets = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=60).map(lambda v: [{'id': f'd{i}', 'site': f's{a}', 'hardware': f'h{b}'} for i, (a, b) in enumerate(v)])


@settings(max_examples=60, deadline=None)
@given(fleets, st.text('0123456789abcdef', min_size=2, max_size=8), st.lists(st.floats(0.5, 100), min_size=1, max_size=5))
def test_a_cohort_has_exactly_its_share_and_no_larger_share_takes_a_device_out(devices, seed, shares):
    before = np.zeros(len(devices), bool)
    for share in sorted(shares):
        now = cohort(devices, campaign(devices, seed, share))
        assert now.sum() == max(1, int(share/100*len(devices) + 0.5)) and (before <= now).all()
        before = now


@settings(max_examples=60, deadline=None)
@given(fleets, st.integers(0, 99), st.floats(1, 99))
def test_no_site_is_without_a_canary_where_there_are_as_many_canaries_as_sites(devices, seed, share):
    chosen = [d for d, c in zip(devices, cohort(devices, campaign(devices, f'{seed:02}', share))) if c]
    sites = {d['site'] for d in devices}
    if len(chosen) >= len(sites): assert {d['site'] for d in chosen} == sites
    if len(chosen) >= len(sites) + len({d['hardware'] for d in devices}): assert {d['hardware'] for d in chosen} == {d['hardware'] for d in devices}
    else: assert len({d['site'] for d in chosen}) == min(len(chosen), len(sites))


@settings(max_examples=40, deadline=None)
@given(fleets, st.integers(0, 99), st.floats(1, 99))
def test_a_device_alone_comes_to_the_answer_of_the_controller(devices, seed, share):
    c = json.loads(json.dumps(campaign(devices, f'{seed:02}', share)))
    assert [takes_part(c, d) for d in devices] == cohort(devices, c).tolist()


def test_rank_is_the_contracts_hash_and_many_ranks_are_the_same():
    import hashlib
    assert rank('ab', 'cam-1') == hashlib.sha256(b'ab:cam-1').hexdigest()
    assert ranks('ab', ['cam-1', 'ü']).tolist() == [rank('ab', 'cam-1').encode(), rank('ab', 'ü').encode()]


def test_kinds_of_hardware_are_seated_in_proportion_not_rounded_away_in_every_site_alike():
    devices = fleet(1200, 30, ('orin',)*8 + ('pi',) + ('nano',))
    chosen = cohort(devices, campaign(devices, 'ab', 10))
    assert {k: sum(c for d, c in zip(devices, chosen) if d['hardware'] == k) for k in ('orin', 'pi', 'nano')} == {'orin': 96, 'pi': 12, 'nano': 12}


def test_a_device_that_joins_later_takes_part_by_the_cutoff_of_its_stratum():
    devices = fleet(340)
    c = campaign(devices, 'ab', 25)
    new = [{'id': f'new-{i}', 'site': s, 'hardware': 'orin'} for s in ('s3', 'unheard-of') for i in range(3000)]
    taken = np.array([takes_part(c, d) for d in new])
    assert abs(taken[3000:].mean() - 0.25) < 0.03 and all(takes_part(c, d) == (rank('ab', d['id']) <= c['cutoffs']['s3/orin']) for d in new[:200])
    assert takes_part({'seed': 'ab', 'strata': STRATA, 'cutoffs': cutoffs(devices, 'ab', 100)}, {'id': 'x', 'site': 'nowhere', 'hardware': 'new'})


def test_nobody_is_taken_out_when_the_inventory_changes_between_two_stages():
    devices = fleet(340)
    first = cutoffs(devices, 'ab', 25)
    was = cohort(devices, {'seed': 'ab', 'strata': STRATA, 'cutoffs': first})
    for later in (devices[:150], devices + fleet(500, odd=1000)):
        now = {'seed': 'ab', 'strata': STRATA, 'cutoffs': cutoffs(later, 'ab', 30, before=first)}
        assert all(takes_part(now, d) for d, c in zip(devices, was) if c)


def test_every_device_of_a_stratum_is_drawn_equally_often():
    devices = fleet(120, 4, ('orin', 'pi'))
    drawn = sum(cohort(devices, campaign(devices, f'{s:04x}', 10)).astype(int) for s in range(400))
    assert abs(drawn.mean() - 40) < 0.01 and drawn.std() < 2*np.sqrt(400*0.1*0.9)


@pytest.mark.parametrize('devices, said', [([], 'no devices'), ([{'id': 'a', 'site': 's'}], 'hardware'), ([{'id': 'a', 'site': 's/x', 'hardware': 'h'}], "'/'"), ([{'id': 'a', 'site': 's', 'hardware': 'h'}]*2, 'twice')])
def test_an_inventory_that_cannot_be_drawn_from_is_refused(devices, said):
    with pytest.raises(EdgenbError, match=said): strata_of(devices)


def test_quotas_of_a_share_of_nothing_are_nothing(): assert quotas(['a/x'], [5], 0, 'ab').tolist() == [0] and cutoffs(fleet(3), 'ab', 100)['*'] == ALL


def test_the_devices_side_loads_nothing_but_the_standard_library():
    code = "import sys; from edgenb.fleet.cohorts import takes_part; takes_part({'seed': 'ab', 'strata': ['site'], 'cutoffs': {}}, {'id': 'a', 'site': 'b'}); print([m for m in ('numpy', 'scipy', 'tuf') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
