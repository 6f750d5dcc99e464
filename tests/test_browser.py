"The wafer recipe, and the desk of the coding recipe, in a real JupyterLab, in a real browser."
import contextlib, json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest
from playwright.sync_api import expect

root = Path(__file__).parents[1]
chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = [pytest.mark.browser, pytest.mark.skipif(chromium is None, reason='no Chromium on this machine (Debian: apt-get install chromium)')]


@pytest.fixture(scope='session')
def browser_type_launch_args(browser_type_launch_args): return {**browser_type_launch_args, 'executable_path': chromium, 'args': ['--no-sandbox']}


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
    finally: process.terminate(); process.wait(20)


def run_all_cells(page, begun: str):
    "Run the notebook that is open, and see it begin: `begun` is a selector of what its cells show. JupyterLab's own promise is not waited for: it was seen never to be kept, and nothing would have ended that wait."
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status=='idle'", timeout=120_000)
    for last in (False, False, True):
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        try: return expect(page.locator(begun).first).to_be_visible(timeout=60_000)
        except AssertionError:
            if last: raise


def test_the_wafer_recipe_runs_in_jupyterlab_and_shows_live_plots(page, lab, tmp_path):
    from edgenb.core import EdgenbError
    from edgenb.weights import fetch
    try: fetch('elpv'); fetch('efficientnet-lite0')
    except EdgenbError as e: pytest.skip(str(e))
    text = (root/'nbs'/'recipes'/'wafer.ipynb').read_text(encoding='utf-8').replace('smoke: bool = False', 'smoke: bool = True').replace('second_turn: bool = True', 'second_turn: bool = False')
    (tmp_path/'wafer.ipynb').write_text(text)
    page.set_viewport_size({'width': 1400, 'height': 1000})
    asked = []
    page.on('request', lambda r: asked.append(r.url))
    page.goto(f'{lab}/lab/tree/wafer.ipynb')
    run_all_cells(page, '.jp-OutputArea-output')
    done = page.wait_for_function("""() => { const cells = window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map(c => c.toJSON());
        const texts = cells.flatMap(c => c.outputs || []).map(o => JSON.stringify(o));
        return texts.some(t => t.includes('"output_type":"error"')) ? 'failed' : texts.some(t => t.includes('smoke run finished')) ? 'finished' : false }""", timeout=300_000).json_value()
    cells = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map(c => c.toJSON())")
    errors = [o for c in cells for o in c.get('outputs', []) if o['output_type'] == 'error']
    assert done == 'finished', json.dumps(errors)[:2000]
    plots = [i for i, c in enumerate(cells) for o in c.get('outputs', []) if 'application/vnd.plotly.v1+json' in o.get('data', {})]
    assert len(plots) == 4   # training, latency, confusion, reliability
    for i in sorted(set(plots)):   # a still picture at first, alive under the mouse
        page.evaluate(f"() => {{ const c = window.jupyterapp.shell.currentWidget.content; c.activeCellIndex = {i}; c.scrollToItem({i}) }}")
        shown = page.locator('.jp-Cell.jp-mod-active .jp-RenderedPlotly').first
        shown.locator('img.plot-img').dispatch_event('mouseenter', timeout=60_000)
        expect(shown.locator('.main-svg').first).to_be_visible(timeout=60_000)
        page.screenshot(path=str(tmp_path/f'plot-{i}.png'))
    assert all(u.startswith((lab, 'data:', 'blob:', lab.replace('http', 'ws'))) for u in asked), [u for u in asked if not u.startswith(lab)]   # nothing from outside


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
