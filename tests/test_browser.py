"The recipes, the panels and the desk of the coding recipe, in a real JupyterLab, in a real browser."
import contextlib, json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest
from playwright.sync_api import TimeoutError, expect

root = Path(__file__).parents[1]
chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = [pytest.mark.browser, pytest.mark.skipif(chromium is None, reason='no Chromium on this machine (Debian: apt-get install chromium)')]


@pytest.fixture(scope='session')
def browser_type_launch_args(browser_type_launch_args): return {**browser_type_launch_args, 'executable_path': chromium, 'args': ['--no-sandbox']}


def end(process):
    "Ask a server to go; a busy one that has not after twenty seconds is made to."
    process.terminate()
    try: process.wait(20)
    except subprocess.TimeoutExpired: process.kill(); process.wait(20)


@pytest.fixture
def lab(tmp_path, tmp_path_factory):
    "The address of a JupyterLab that serves `tmp_path`, with settings of its own: neither does it read those of this machine's user, nor leave anything there."
    home = tmp_path_factory.mktemp('jupyter')
    own = {f'JUPYTER_{what}_DIR': str(home/what.lower()) for what in ('CONFIG', 'DATA', 'RUNTIME')} | {f'JUPYTERLAB_{what}_DIR': str(home/what.lower()) for what in ('SETTINGS', 'WORKSPACES')}
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--IdentityProvider.token=',
                                f'--ServerApp.root_dir={tmp_path}', '--LabApp.expose_app_in_browser=True', '--LabApp.news_url=None'], env=os.environ | own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError): urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status', timeout=30); break
            time.sleep(0.5)
        yield f'http://127.0.0.1:{port}'
    finally: end(process)


def run_all_cells(page, begun: str):
    "Run the notebook that is open, and see it begin: `begun` is a selector of what its cells show. JupyterLab's own promise is not waited for: it was seen never to be kept, and nothing would have ended that wait."
    idle = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status=='idle'"
    for last in (False, False, True):     # a page was once seen that never heard of its kernel: it is loaded again, as a reader would
        try: page.wait_for_function(idle, timeout=60_000); break
        except TimeoutError:
            if last: raise
            page.reload()
    for last in (False, False, True):
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        try: return expect(page.locator(begun).first).to_be_visible(timeout=60_000)
        except AssertionError:
            if last: raise


@pytest.fixture
def opened(tmp_path, tmp_path_factory):
    "The address, token and all, at which `edgenb open wafer` serves a copy in `tmp_path`; its run is to be a small one."
    home = tmp_path_factory.mktemp('jupyter')
    own = {f'JUPYTER_{what}_DIR': str(home/what.lower()) for what in ('CONFIG', 'DATA', 'RUNTIME')} | {f'JUPYTERLAB_{what}_DIR': str(home/what.lower()) for what in ('SETTINGS', 'WORKSPACES')}
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    with open(home/'said', 'w') as said:
        process = subprocess.Popen([Path(sys.executable).parent/'edgenb', 'open', 'wafer', '--no-browser', '--port', str(port), '--jupyter=--allow-root', '--jupyter=--LabApp.expose_app_in_browser=True', '--jupyter=--LabApp.news_url=None'],
                                   cwd=tmp_path, env=os.environ | own, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            if found := re.search(rf'http://(?:127\.0\.0\.1|localhost):{port}/lab/tree/\S+token=\w+', (home/'said').read_text()): break
            assert process.poll() is None, (home/'said').read_text()
            time.sleep(0.5)
        yield found[0]
    finally: end(process)


def test_edgenb_open_copies_the_wafer_recipe_which_runs_in_jupyterlab_and_shows_live_plots_and_panels(page, opened, tmp_path):
    from edgenb.core import EdgenbError
    from edgenb.weights import fetch
    try: fetch('elpv'); fetch('efficientnet-lite0')
    except EdgenbError as e: pytest.skip(str(e))
    lab = opened.split('/lab/')[0]
    text = (tmp_path/'wafer.ipynb').read_text(encoding='utf-8').replace('smoke: bool = False', 'smoke: bool = True').replace('second_turn: bool = True', 'second_turn: bool = False')
    (tmp_path/'wafer.ipynb').write_text(text)
    assert urllib.request.urlopen(f'{lab}/lab').url.startswith(f'{lab}/login')      # without its token nobody gets in
    page.set_viewport_size({'width': 1400, 'height': 1000})
    asked = []
    page.on('request', lambda r: asked.append(r.url))
    page.goto(opened)
    run_all_cells(page, '.jp-OutputArea-output')
    done = page.wait_for_function("""() => { const cells = window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map(c => c.toJSON());
        const texts = cells.flatMap(c => c.outputs || []).map(o => JSON.stringify(o));
        return texts.some(t => t.includes('"output_type":"error"')) ? 'failed' : texts.some(t => t.includes('smoke run finished')) ? 'finished' : false }""", timeout=300_000, polling=2000).json_value()
    cells = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map(c => c.toJSON())")
    errors = [o for c in cells for o in c.get('outputs', []) if o['output_type'] == 'error']
    assert done == 'finished', json.dumps(errors)[:2000]
    plots = [i for i, c in enumerate(cells) for o in c.get('outputs', []) if 'application/vnd.plotly.v1+json' in o.get('data', {})]
    assert len(plots) == 3   # training, confusion, reliability
    for i in sorted(set(plots)):   # a still picture at first, alive under the mouse
        page.evaluate(f"() => {{ const c = window.jupyterapp.shell.currentWidget.content; c.activeCellIndex = {i}; c.scrollToItem({i}) }}")
        shown = page.locator('.jp-Cell.jp-mod-active .jp-RenderedPlotly').first
        shown.locator('img.plot-img').dispatch_event('mouseenter', timeout=60_000)
        expect(shown.locator('.main-svg').first).to_be_visible(timeout=60_000)
        page.screenshot(path=str(tmp_path/f'plot-{i}.png'))
    i = next(i for i, c in enumerate(cells) if ''.join(c['source']) == 'budget(run)')
    page.evaluate(f"() => {{ const c = window.jupyterapp.shell.currentWidget.content; c.activeCellIndex = {i}; c.scrollToItem({i}) }}")
    expect(page.locator('.jp-Cell.jp-mod-active .edgenb-panel [role=status]').first).to_contain_text('artifacts pass', timeout=60_000)
    assert all(u.startswith((lab, 'data:', 'blob:', lab.replace('http', 'ws'))) for u in asked), [u for u in asked if not u.startswith(lab)]   # nothing from outside


KERNEL = {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}

def judged_run(folder):
    "A run with two suspicious labels and two artifacts, made up without a model."
    import numpy as np
    from edgenb.core import Card, digest
    from edgenb.data import Example, save_examples
    from conftest import toy_image
    (folder/'01-data.1').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(4): toy_image(rng, n % 2 == 1).save(folder/f'{n}.png')
    save_examples([Example(f'cell-{n}', f'../{n}.png', 'clean', split='train', kind='synthetic', sha256=digest(folder/f'{n}.png')) for n in range(4)], folder/'01-data.1/examples.jsonl')
    (folder/'01-data.1/problems.jsonl').write_text('\n'.join(json.dumps({'id': f'cell-{n}', 'problem': 'label may be wrong: a model that did not see it says scratch', 'confidence': c}) for n, c in ((1, 0.07), (3, 0.02), (2, 0.4))))
    def card(room, asked, result, *files): Card(room, 'f'*64, asked, {}, {f: digest(folder/f) for f in files}, result, 'synthetic', '', 1.0, {}, '0').save(folder/f"{'01' if room == 'data' else '05'}-{room}.json")
    def row(artifact, runtime, value, p95, size): return {'artifact': artifact, 'runtime': runtime, 'precision': 'fp32', 'metric': 'accuracy', 'value': value, 'low': value - .02, 'high': value + .02, 'delta': value - .91, 'delta_low': value - .93, 'delta_high': value - .89, 'p95_ms': p95, 'size_mb': size, 'rss_mb': 90.0, 'verdict': 'pass', 'reason': 'it holds', 'over': {}}
    card('data', {'decisions': ''}, {'classes': ['clean', 'scratch'], 'certificate': {'gates': []}, 'splits': {}}, '01-data.1/examples.jsonl', '01-data.1/problems.jsonl')
    rows = [row('reference', 'torch', .91, 40., 13.4), row('small', 'onnxruntime', .90, 6., 3.6), row('fast', 'onnxruntime', .91, 4., 13.3)]
    card('verify', {'latency_budget_ms': 22.0}, {'rows': rows, 'chosen': 'fast', 'front': ['small', 'fast'], 'classes': ['clean', 'scratch'], 'budget': {'device': 'local'}})


def test_labels_are_triaged_by_single_keys_and_a_slider_moves_the_choice_and_the_saved_notebook_reads_without_a_kernel(page, lab, tmp_path):
    import nbformat
    judged_run(tmp_path/'runs'/'toy'/'now')
    sources = ("from edgenb.panel import triage\ntriage('runs/toy/now', decisions='labels.jsonl', who='Ada')", "from edgenb.panel import budget\nbudget('runs/toy/now')")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources], metadata=KERNEL), tmp_path/'panels.ipynb')
    page.set_viewport_size({'width': 1400, 'height': 1900})
    page.goto(f'{lab}/lab/tree/panels.ipynb')
    run_all_cells(page, '.edgenb-panel')
    desk, bench = page.locator('.edgenb-panel').first, page.locator('.edgenb-panel').nth(1)
    status, keys = desk.locator('[role=status]'), desk.get_by_label('Keys')
    expect(status).to_contain_text('1 of 3, 0 decided', timeout=60_000)
    expect(desk.get_by_alt_text('cell-3, labelled clean')).to_be_visible()        # the least believable first
    keys.focus()
    page.keyboard.press('2'); expect(status).to_contain_text('2 of 3, 1 decided. cell-3: relabelled as scratch')
    page.keyboard.press('k'); expect(status).to_contain_text('3 of 3, 2 decided. cell-1: kept')
    page.keyboard.press('u'); expect(status).to_contain_text('2 of 3, 1 decided. cell-1: taken back')
    expect(keys).to_be_focused()
    page.keyboard.press('d'); expect(status).to_contain_text('cell-1: left out')
    page.keyboard.press('Tab')
    expect(desk.get_by_role('button', name='Keep (k)')).to_be_focused()            # every key is a button too
    assert page.evaluate('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    page.keyboard.press('Enter'); expect(status).to_contain_text('All 3 are decided')
    rows = [json.loads(l) for l in (tmp_path/'labels.jsonl').read_text().splitlines()]
    assert [(r['note'].split('@')[0], r['action'], r.get('after')) for r in rows] == [('cell-3', 'correct', 'scratch'), ('cell-1', 'confirm', 'clean'), ('cell-1', 'undo', None), ('cell-1', 'reject', None), ('cell-2', 'confirm', 'clean')]
    assert all(r['who'] == 'Ada' and r['when'].endswith('Z') for r in rows)
    chosen = bench.locator('[role=status]')
    expect(chosen).to_contain_text('fast:')
    handle = bench.locator('.widget-slider .noUi-handle').nth(1)                   # the size on disk
    handle.focus()
    for _ in range(20):
        if 'small:' in chosen.inner_text(): break
        page.keyboard.press('ArrowLeft'); page.wait_for_timeout(300)
    expect(chosen).to_contain_text('small:')
    page.screenshot(path=str(tmp_path/'panels.png'))
    page.evaluate("() => { window.jupyterapp.commands.execute('docmanager:save') }")
    for _ in range(60):
        saved = nbformat.read(tmp_path/'panels.ipynb', 4)
        if any(c.outputs for c in saved.cells): break
        time.sleep(0.5)
    text = json.dumps(saved)
    assert 'every hop, from the tuned network down' in text and '3 images to look at, 3 decided' in text and 'widgets' not in saved.metadata
    nbformat.write(saved, tmp_path/'later.ipynb')
    page.goto(f'{lab}/lab/tree/later.ipynb?reset')
    expect(page.get_by_text('every hop, from the tuned network down')).to_be_visible(timeout=60_000)   # no kernel has run this one
    expect(page.get_by_text('3 images to look at, 3 decided')).to_be_visible()
    page.screenshot(path=str(tmp_path/'later.png'))
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status=='idle'", timeout=60_000)   # a server that starts a kernel does not end


def test_a_press_on_stop_ends_the_training_and_the_same_cell_goes_on(page, lab, tmp_path):
    import nbformat
    import numpy as np
    from conftest import toy_image
    from edgenb.core import Card, EdgenbError, digest
    from edgenb.data import Example, save_examples
    from edgenb.weights import fetch
    try: fetch('efficientnet-lite0')
    except EdgenbError as e: pytest.skip(str(e))
    run, rng = tmp_path/'runs'/'toy'/'now', np.random.default_rng(0)
    (run/'01-data.1').mkdir(parents=True)
    for n in range(48): toy_image(rng, n % 2 == 1).save(run/f'{n}.png')
    save_examples([Example(f'cell-{n}', f'../{n}.png', ('clean', 'scratch')[n % 2], split='validation' if n < 12 else 'train', kind='synthetic', sha256=digest(run/f'{n}.png')) for n in range(48)], run/'01-data.1/examples.jsonl')
    Card('data', 'f'*64, {}, {}, {'01-data.1/examples.jsonl': digest(run/'01-data.1/examples.jsonl')}, {'classes': ['clean', 'scratch'], 'negative': 'clean', 'certificate': {'gates': []}}, 'synthetic', '', 1.0, {}, '0').save(run/'01-data.json')
    source = f"from edgenb.panel import tune_live\ntune_live('{run}', method='head', size=64, num_train_epochs=500, patience=500, num_threads=1)"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=KERNEL), tmp_path/'tuning.ipynb')
    page.set_viewport_size({'width': 1400, 'height': 1000})
    page.goto(f'{lab}/lab/tree/tuning.ipynb')
    run_all_cells(page, '.edgenb-panel')
    output = page.locator('.jp-OutputArea').first
    expect(page.locator('.edgenb-panel [role=status]')).to_contain_text('validation loss', timeout=90_000)
    page.locator('.edgenb-panel button').click()                                  # the cell is still at work
    expect(output).to_contain_text('EdgenbError: tune was stopped in epoch', timeout=60_000)
    assert 'Traceback' not in output.inner_text()
    page.screenshot(path=str(tmp_path/'stopped.png'))
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status=='idle'", timeout=60_000)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    expect(output).to_contain_text('going on after epoch', timeout=90_000)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:interrupt-kernel') }")   # and this says the way out as well
    expect(output).to_contain_text('EdgenbError: tune was interrupted', timeout=60_000)
    assert 'Traceback' not in output.inner_text()


DESK = """
from edgenb.coder import Suggestion, review
from edgenb.decisions import Decisions
from edgenb.notes import Note
texts = ['Wheezing. <script>window.harmed = true</script><img src=x onerror="window.harmed = true">', 'On insulin.', 'Cough.', 'BP 160/95.']
notes = [Note(f'visit-{n}', t, kind='synthetic') for n, t in enumerate(texts)]
codes = {'J45.909': 'Asthma <img src=x onerror="window.harmed = true">', 'E11.9': 'Type 2 diabetes', 'I10': 'Hypertension'}
suggestions = [[Suggestion(c, d, p, ((0, 8, 1.0),)) for (c, d), p in zip(codes.items(), (.7, .2, .1))] for _ in notes]
review(notes, suggestions, Decisions('decisions.jsonl'), 'Dr. Osei', 'sha256:5f1c', codes)
"""

def test_notes_are_decided_on_in_jupyterlab_with_the_keyboard_alone(page, lab, tmp_path):
    import nbformat
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(DESK)], metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}), tmp_path/'desk.ipynb')
    page.set_viewport_size({'width': 1400, 'height': 1000})
    page.goto(f'{lab}/lab/tree/desk.ipynb')
    run_all_cells(page, '.edgenb-review')
    status, line = page.locator('.edgenb-review [role=status]'), page.locator('.edgenb-review .widget-text input').first
    expect(status).to_contain_text('note 1 of 4', timeout=60_000)
    line.focus()
    page.keyboard.type('1'); page.keyboard.press('Enter')
    expect(status).to_contain_text('note 2 of 4')
    expect(line).to_be_focused(); expect(line).to_have_value('')
    page.keyboard.type('c I10'); page.keyboard.press('Enter')         # faster than anybody types
    expect(status).to_contain_text('note 3 of 4')
    page.keyboard.type('x'); page.keyboard.press('Tab')               # left half-typed: nothing happens
    expect(status).to_contain_text('press Enter')
    buttons = page.locator('.edgenb-review button')
    expect(buttons.first).to_be_focused()                             # the suggestions are real buttons, in order
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == 'solid'
    page.keyboard.press('Tab'); page.keyboard.press('Enter')
    expect(buttons.nth(1)).to_have_text('2  E11.9  (looked at)')
    expect(line).to_be_focused()                                      # or the next letter would be a command of JupyterLab
    for _ in range(4): page.keyboard.press('Tab')                     # past three suggestions, to "Take it"
    page.keyboard.press('Enter')
    expect(status).to_contain_text('note 4 of 4')
    buttons.nth(2).click()
    expect(line).to_be_focused()
    page.keyboard.type('u'); page.keyboard.press('Enter')
    expect(status).to_contain_text('taken back')
    rows = [json.loads(l) for l in (tmp_path/'decisions.jsonl').read_text().splitlines()]
    assert [(r['note'], r['action'], r.get('after')) for r in rows] == [('visit-0', 'confirm', 'J45.909'), ('visit-1', 'correct', 'I10'), ('visit-2', 'correct', 'E11.9'), ('visit-2', 'undo', None)]
    assert page.evaluate('window.harmed') is None
    page.screenshot(path=str(tmp_path/'desk.png'))
