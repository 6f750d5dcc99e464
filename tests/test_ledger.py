"The table of all runs: asked, drawn, exported; runs of other versions in it."
import csv, io, json, re, shutil
import pytest
from edgenb.core import EdgenbError, Run, digest_of
from edgenb.ledger import ask, front, pareto_figure, table, to_mlflow
from edgenb.mill import summary
from test_mill import call, refused


@pytest.fixture
def runs(toy_run, tmp_path):
    "Two runs of a toy recipe with their records."
    for n, prune in enumerate((0.0, 0.3)):
        shutil.copytree(toy_run.path, tmp_path/'runs'/'toy'/f'r{n}')
        (tmp_path/'runs'/'toy'/f'r{n}'/'job.json').write_text(json.dumps({'status': 'done', 'recipe': 'toy', 'values': {'prune': prune, 'precisions': ['fp32'], 'seed': n}, 'seconds': 1.0, 'error': None, 'cell': None}))
    (tmp_path/'runs'/'toy'/'r2').mkdir()
    (tmp_path/'runs'/'toy'/'r2'/'job.json').write_text(json.dumps({'status': 'failed', 'recipe': 'toy', 'values': {'prune': 0.9, 'precisions': ['fp32'], 'seed': 0}, 'seconds': 1.0, 'error': 'ValueError: too much', 'cell': 7}))
    return tmp_path/'runs'


def test_parameters_are_columns_that_can_be_asked(runs):
    done = call('compare', runs, '--where', "prune > 0 and status = 'done'", '--columns', 'run,prune,verdict,tune.validation.epoch', cwd=runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() [:4] == ['run', 'prune', 'verdict', 'tune.validation.epoch'] and done.stdout.splitlines()[1].split()[:2] == ['r1', '0.3'] and len(done.stdout.splitlines()) == 2
    assert 'ValueError: too much (cell [7])' in call('compare', runs, cwd=runs).stdout
    assert [r['run'] for r in ask(table(runs), sort='prune desc')] == ['r2', 'r1', 'r0']
    assert {r['artifact'] for r in table(runs, artifacts=True) if r['run'] == 'r0'} >= {'reference', 'onnxruntime-fp32'}


@pytest.mark.parametrize('args, says', [(['--where', 'prun > 0'], 'Did you mean prune'), (['--where', 'prune >'], 'syntax error'), (['--columns', 'prun'], 'Did you mean prune'), (['--sort', 'valu'], 'Did you mean value'), (['--where', "1=1) or (select count(*) from '/etc/passwd') > 0 or (1=1"], 'where')])
def test_a_question_that_makes_no_sense_is_one_line(runs, args, says): refused(call('compare', runs, *args, cwd=runs), says)


def test_a_run_of_an_older_version_is_a_row_that_says_so(runs):
    path = runs/'toy'/'r0'/'05-verify.json'
    card = json.loads(path.read_text())
    card.pop('seal'); card['result'].pop('budget'); card['edgenb'] = '0.0.1'
    path.write_text(json.dumps(card | {'seal': digest_of(card)}))
    sealed = runs/'toy'/'r1'/'02-tune.json'
    old = {k: v for k, v in json.loads(sealed.read_text()).items() if k not in ('seal', 'environment')}
    sealed.write_text(json.dumps(old))
    done = call('compare', runs, cwd=runs)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4 and "of edgenb 0.0.1 and lack 'budget'" in done.stdout and '02-tune.json is not a card' in done.stdout


def test_the_page_asks_nobody_for_anything_and_says_what_is_synthetic(runs, tmp_path):
    assert call('compare', runs, '--html', tmp_path/'page.html', '--csv', tmp_path/'rows.csv', cwd=runs).returncode == 0
    page = (tmp_path/'page.html').read_text()
    head = page.split('<script>')[0]
    assert not re.search(r'(src|href)=', head) and 'synthetic' in head and 'ValueError: too much' in head and 'Plotly.newPlot' in page
    rows = list(csv.DictReader(io.StringIO((tmp_path/'rows.csv').read_text())))
    assert [r['prune'] for r in rows] == ['0.0', '0.3', '0.9'] and rows[2]['status'] == 'failed'


def test_the_front_leaves_out_what_is_beaten():
    rows = [{'value': v, 'p95_ms': p} for v, p in ((.9, 2), (.9, 1), (.8, .5), (.7, .6), (None, .1))]
    assert [(r['value'], r['p95_ms']) for r in front(rows, 'p95_ms')] == [(.8, .5), (.9, 1)]


def test_mlflow_gets_each_run_once(runs, tmp_path):
    pytest.importorskip('mlflow')
    rows = table(runs)
    assert to_mlflow(rows, str(tmp_path/'ml')) == (3, 0) and to_mlflow(rows, str(tmp_path/'ml')) == (0, 3)
    from mlflow import MlflowClient
    client = MlflowClient((tmp_path/'ml').as_uri())
    found = {r.data.tags['edgenb.id']: r for r in client.search_runs([client.get_experiment_by_name('toy').experiment_id])}
    assert set(found) == {'toy/r0', 'toy/r1', 'toy/r2'} and found['toy/r1'].data.params['prune'] == '0.3' and found['toy/r2'].info.status == 'FAILED'
    assert found['toy/r0'].data.metrics['value'] == summary(Run(runs/'toy'/'r0'))['value'] and found['toy/r0'].data.tags['edgenb.data'] == 'synthetic'


def test_a_page_goes_where_it_is_asked_for_or_a_line_says_why_not(runs, tmp_path):
    done = call('compare', runs, '--html', 'out/deep/page.html', '--csv', 'other/rows.csv', cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path/'out'/'deep'/'page.html').is_file() and (tmp_path/'other'/'rows.csv').is_file(), done.stderr
    (tmp_path/'file').write_text('')
    refused(call('compare', runs, '--html', 'file/page.html', cwd=tmp_path), 'file')
    refused(call('compare', runs, '--html', 'out', cwd=tmp_path), 'out')


def test_the_front_of_a_metric_that_is_better_when_smaller_is_the_right_way_up():
    rows = [{'metric': 'false-positive rate', 'value': v, 'p95_ms': p} for v, p in ((.1, 2), (.1, 1), (.2, .5), (.3, .6))]
    assert [(r['value'], r['p95_ms']) for r in front(rows, 'p95_ms')] == [(.2, .5), (.1, 1)]


def test_a_figure_shows_bounds_of_zero_and_what_was_varied():
    rows = [{'metric': 'false-positive rate', 'run': f'r{n}', 'value': 0.1, 'low': 0.0, 'high': None, 'p95_ms': 1, 'parameters': {'rank': n, 'kept': 'same'}} for n in (1, 2)]
    marks = pareto_figure(rows).data[0]
    assert list(marks.error_y.arrayminus) == [0.1, 0.1] and list(marks.error_y.array) == [0, 0]
    assert 'rank: 2' in marks.text[1] and 'same' not in marks.text[1]


def test_mlflow_takes_quotes_and_changed_parameters_and_learns_no_path_and_no_message(tmp_path):
    pytest.importorskip('mlflow')
    from mlflow import MlflowClient
    row = lambda n: {'recipe': "bob's", 'run': 'r', 'path': '/home/bob/r', 'bundle': '/home/bob/r/bundle', 'status': 'failed', 'reason': 'ValueError: could not convert: Patient John Smith (cell [3])', 'value': 1.0, 'parameters': {'n': n, 'text': 'x'*7000}}
    assert [to_mlflow([row(n)], str(tmp_path/'ml')) for n in (1, 1, 2, 1)] == [(1, 0), (0, 1), (1, 0), (0, 1)]
    to_mlflow([row(3) | {'reason': '/home/bob/x is gone: Smith'}], str(tmp_path/'ml'))
    client = MlflowClient((tmp_path/'ml').as_uri())
    found = client.search_runs([client.get_experiment_by_name('bob_s').experiment_id])
    assert sorted(r.data.params['n'] for r in found) == ['1', '2', '3'] and {r.data.tags.get('edgenb.reason') for r in found} == {'ValueError', None}
    assert not [v for r in found for v in r.data.tags.values() if '/home/bob' in v or 'Smith' in v]


def test_a_column_that_is_text_in_some_runs_is_refused_with_the_way_out():
    rows = [{'recipe': 'a', 'run': 'x', 'parameters': {'n': 1}}, {'recipe': 'b', 'run': 'y', 'parameters': {'n': 'one'}}]
    with pytest.raises(EdgenbError, match=r'try_cast\(n as double\)'): ask(rows, 'n > 0')
    assert [r['run'] for r in ask(rows, 'try_cast(n as double) > 0')] == ['x']
