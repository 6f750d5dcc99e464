"The book: pages from notebooks, nothing from outside, every link leads somewhere, every command in it exists."
import base64, functools, http.server, importlib.util, json, re, shlex, shutil, sys, threading
from pathlib import Path
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'docs'))
import book, documented, pages  # noqa: E402
from pages import PLOTLY, STATE, VIEW, directives, page, relink  # noqa: E402

PIXEL = base64.b64encode(b'\x89PNG not really').decode()


def code(source, *outputs, **metadata): return {'cell_type': 'code', 'id': 'c', 'metadata': metadata, 'source': source, 'outputs': list(outputs), 'execution_count': 1}
def words(source): return {'cell_type': 'markdown', 'id': 'm', 'metadata': {}, 'source': source}
def shown(**data): return {'output_type': 'display_data', 'metadata': {}, 'data': {k.replace('__', '/'): v for k, v in data.items()}}
def notebook(*cells, **metadata): return {'nbformat': 4, 'nbformat_minor': 5, 'metadata': metadata, 'cells': list(cells)}
def made(*cells, target='toy', **kw): return page(notebook(*cells, **kw), 'nbs/00_toy.ipynb', target, {'nbs/00_toy.ipynb': 'toy.ipynb', 'nbs/21_other.ipynb': 'other.ipynb', 'CONTRIBUTING.md': 'contributing.md'})
def body(p): return [c for c in p.notebook['cells'] if c['cell_type'] != 'raw']
def html_of(p): return ''.join(o['data'].get('text/html', '') for c in body(p) if c['cell_type'] == 'code' for o in c['outputs'])


# ---- the adapter

def test_title_and_sentence_become_the_pages_own():
    p = made(words('# toy\n\n> One sentence\n> over two lines.\n\nThen prose.'))
    assert (p.title, p.lead) == ('toy', 'One sentence over two lines.') and body(p)[0]['source'] == 'Then prose.'
    assert made(code('#| hide\nx=1'), words('No heading here.')).title == 'toy'


@pytest.mark.parametrize('directive', ['default_exp toy', 'hide', 'include: false'])
def test_a_hidden_cell_leaves_nothing(directive):
    assert body(made(words('# a'), code(f'#| {directive}\nsecret = 1', {'output_type': 'stream', 'name': 'stdout', 'text': 'secret'}))) == []


@pytest.mark.parametrize('directive, tag', [('echo: false', 'remove-input'), ('hide_input', 'remove-input'), ('output: false', 'remove-output'), ('hide_output', 'remove-output')])
def test_code_or_output_alone_can_be_hidden(directive, tag):
    cell, = body(made(code(f'#| {directive}\nx')))
    assert cell['metadata']['tags'] == [tag] and '#|' not in cell['source']


def test_an_exported_cell_is_folded_below_what_it_defines():
    above, cell = body(made(code('#| default_exp toy'), code('#| export\ndef psi(expected: list,  # reference\n        bins: int = 10  # of it\n       ) -> float:\n    "How far `actual` moved & <why>."\n    return 0\ndef _private(): pass\nclass Thing: "A thing."')))
    assert cell['source'].startswith('#| code-fold: true\n#| code-summary: Source\ndef psi(')
    assert '`psi(expected, bins=10)`\\\nHow far `actual` moved & \\<why\\>.' in above['source'] and '`Thing`\\\nA thing.' in above['source'] and '_private' not in above['source']


def test_what_an_exported_cell_defines_links_to_the_reference():
    nb = notebook(code('#| default_exp toy'), code('#| export\ndef psi(): "Doc."'))
    cells = page(nb, 'nbs/a/toy.ipynb', 'a/toy', {}, {'edgenb.toy.psi': '/api/toy.qmd#psi'}).notebook['cells']
    assert '[`psi()`](/api/toy.qmd#psi)' in cells[1]['source']


def test_a_cell_of_imports_is_called_so_and_a_cell_that_is_no_python_stays():
    imports, broken = body(made(code('#| export\nimport os\nfrom re import sub'), code('#| export\ndef (')))
    assert '#| code-summary: Imports' in imports['source'] and broken['source'].endswith('def (')


def test_folding_lines_to_hide_warnings_and_streams_are_obeyed():
    stream = lambda name, text: {'output_type': 'stream', 'name': name, 'text': text}
    fold, line, warning, filtered = body(made(code('#| code-fold: show\n#| code-summary: "See"\nx'), code('a = 1\nb = 2 #|hide_line'), code('#| warning: false\nx', stream('stderr', 'careful'), stream('stdout', 'fine')), code('#| filter_stream noise\nx', stream('stderr', 'much noise'))))
    assert fold['source'] == '#| code-fold: show\n#| code-summary: "See"\nx' and line['source'] == 'a = 1'
    assert [o['text'] for o in warning['outputs']] == ['fine'] and filtered['outputs'] == []


@pytest.mark.parametrize('directive', ['slow', 'eval: false'])
def test_a_cell_that_is_not_run_says_so(directive):
    cell, note = body(made(code(f'#| {directive}\nx = 1')))
    assert cell['source'] == 'x = 1' and 'was not run for the book' in note['source'] and pages.not_run(f'#| {directive}\nx') and not pages.not_run('#| eval: true\nx')


def test_directives_are_read_however_they_are_written():
    assert directives('#|export\n# | echo: false\n#|  code-summary: a: b\nx = 1')[0] == {'export': '', 'echo': 'false', 'code-summary': 'a: b'}
    assert directives('x = "#| hide"')[0] == {}


def test_a_plot_shows_its_still_picture_and_keeps_its_data_beside_the_page():
    figure = {'data': [{'type': 'bar', 'x': ['</script><b>'], 'y': [1]}], 'layout': {'title': {'text': 'A "plot"<br>of <two>'}, 'width': 640, 'height': 300, 'template': {'layout': {}}}}
    p = made(code('x', {'output_type': 'display_data', 'metadata': {}, 'data': {PLOTLY: figure, 'image/png': PIXEL, 'text/plain': 'x'}}), target='a/toy')
    h = html_of(p)
    assert 'data-height="300"' in h and 'alt="A &quot;plot&quot; of &lt;two&gt;"' in h and '<script' not in h and 'src="../pictures/' in h
    script, = [v.decode() for k, v in p.assets.items() if k.startswith('plots/')]
    told = json.loads(re.match(r'edgenbPlot\("\w+",(.*)\)\n$', script)[1])
    assert told['data'] == figure['data'] and set(told['layout']) == {'title', 'height'}      # as wide as the page, in its colours


def test_a_plot_without_a_still_picture_says_that_it_needs_javascript():
    assert '<noscript>' in html_of(made(code('x', {'output_type': 'display_data', 'metadata': {}, 'data': {PLOTLY: {'data': [], 'layout': {'title': 'T'}}}})))


def test_a_map_which_would_be_loaded_from_a_server_is_left_out():
    figure = lambda kind: {'output_type': 'display_data', 'metadata': {}, 'data': {PLOTLY: {'data': [{'type': kind}], 'layout': {}}}}
    p = made(code('x', figure('scattermapbox'), figure('choropleth'), figure('heatmap'), figure('treemap')))
    assert len([k for k in p.assets if k.startswith('plots/')]) == 2 and html_of(p).count('left out') == 2 and html_of(p).count('edgenb-plot') == 2


def widget(model='IntSliderModel'): return {STATE: {'version_major': 2, 'version_minor': 0, 'state': {'abc': {'model_name': 'HBoxModel', 'model_module': '@jupyter-widgets/controls', 'state': {'children': ['IPY_MODEL_def']}}, 'def': {'model_name': model, 'state': {}}}}}
def view(plain): return {'output_type': 'display_data', 'metadata': {}, 'data': {VIEW: {'model_id': 'abc'}, 'text/plain': plain}}


def test_a_widget_stays_alive_where_its_state_was_kept_and_is_text_where_it_was_not():
    p = made(code('x', view('level <3>')), widgets=widget())
    assert 'data-model="abc"' in html_of(p) and 'level &lt;3&gt;' in html_of(p) and any(k.startswith('widgets/') for k in p.assets) and 'edgenb-widget-state' in body(p)[-1]['source']
    cell, = body(made(code('x', view('level 3'))))
    assert cell['outputs'] == [{'output_type': 'display_data', 'metadata': {}, 'data': {'text/plain': 'level 3'}}]
    cell, = body(made(code('x', view('HBox(children=(IntSlider(value=0),))'))))
    assert cell['outputs'] == []                               # the name of a class tells a reader nothing


def test_of_a_progress_bar_stays_at_most_its_last_word():
    p = made(code('x', view('level'), view('  0%|  | 0/5'), {'output_type': 'stream', 'name': 'stderr', 'text': '  0%|  |\r 50%|# |\r100%|##|\n'}), widgets=widget('FloatProgressModel'))
    assert [o['text'] for o in body(p)[0]['outputs']] == ['100%|##|\n'] and not any(k.startswith('widgets/') for k in p.assets)
    assert body(made(code('x', view('checking:   0%|  | 0/5'))))[0]['outputs'] == []                    # nor where its state was not kept


def test_an_error_is_shown_and_that_of_a_user_without_its_traceback():
    error = lambda name: {'output_type': 'error', 'ename': name, 'evalue': 'no <b>', 'traceback': ['Traceback', 'deep']}
    user, ours = body(made(code('x', error('EdgenbError')), code('y', error('KeyError'))))
    assert user['outputs'][0]['traceback'] == ['EdgenbError: no <b>'] and ours['outputs'][0]['traceback'] == ['Traceback', 'deep']


def test_a_picture_becomes_a_file_with_a_text_beside_it():
    p = made(code('x', shown(image__png=PIXEL, text__plain='<PIL.Image.Image>'), shown(image__png=PIXEL, text__plain='A "lid"')))
    assert html_of(p).count('pictures/') == 2 and len(p.assets) == 1 and 'alt="Picture made by the cell above"' in html_of(p) and 'alt="A &quot;lid&quot;"' in html_of(p)


def test_unknown_outputs_leave_their_text_or_nothing():
    cell, = body(made(code('x', shown(**{'application__vnd.x+json': '{}', 'text__plain': 'four'}), shown(**{'application__vnd.x+json': '{}'}))))
    assert [o['data'] for o in cell['outputs']] == [{'text/plain': 'four'}]


@pytest.mark.parametrize('printed', ['| a |\n|---|\n| <script>alert(1)</script> |', '<img src=x onerror=alert(1)>', '\\`<b onclick=x>\\`', '```{=html}\n<script>alert(1)</script>\n```', 'x `<b>`{=html}', '[x]{onclick=alert(1)}', '# x {onclick=alert(1)}', '~~~ {=html}\n<i>\n~~~'])
def test_markdown_that_code_has_printed_brings_no_html_into_the_page(printed):
    markdown = pytest.importorskip('smalldocs.markdown')
    cell, = body(made(code('x', shown(text__markdown=printed))))
    told = cell['outputs'][0]['data']['text/markdown']
    assert not re.search(r'<(script|img|b)\b|<i>|<[^>]*onclick', markdown.make_parser().render(told)), told


def test_markdown_that_code_has_printed_keeps_its_marks_and_its_code():
    cell, = body(made(code('x', shown(text__markdown='**5 < 6** and `a<b>`, a\\<b, <3'))))
    assert cell['outputs'][0]['data']['text/markdown'] == '**5 < 6** and `a<b>`, a\\<b, <3'


@pytest.mark.parametrize('link, becomes', [('[a](21_other.ipynb)', '[a](/other.ipynb)'), ('[a](nbs/21_other.ipynb#x)', '[a](/other.ipynb#x)'), ('[`a`](21_other.ipynb)', '[`a`](/other.ipynb)'), ('[a](../CONTRIBUTING.md)', '[a](/contributing.md)'),
                                           ('[a](https://x.org/y.ipynb)', '[a](https://x.org/y.ipynb)'), ('[a](#here)', '[a](#here)'), ('[a](certificate.html)', '[a](certificate.html)'), ('`[a](21_other.ipynb)`', '`[a](21_other.ipynb)`'),
                                           ('```\n[a](21_other.ipynb)\n```', '```\n[a](21_other.ipynb)\n```')])
def test_links_written_for_the_repository_lead_to_pages(link, becomes):
    problems = []
    assert relink(link, 'nbs/00_toy.ipynb', {'nbs/21_other.ipynb': 'other.ipynb', 'CONTRIBUTING.md': 'contributing.md'}, problems) == becomes and not problems


def test_a_link_to_what_is_not_in_the_book_is_told_and_leaves_its_words():
    problems = []
    assert relink('see [this file](missing.ipynb).', 'nbs/a.ipynb', {}, problems) == 'see this file.' and len(problems) == 1


# ---- the whole

def test_every_notebook_is_in_the_navigation_exactly_once():
    found = book.entries()
    lost, twice = book.missing_from(found)
    assert not lost and not twice, 'put it into docs/book.toml'
    targets = [e.target for e in found]
    assert len(set(targets)) == len(targets)
    assert {f'howto/{p.stem}' for p in (ROOT/'docs'/'howto').glob('*.md')} == {t for t in targets if t.startswith('howto/')}


def test_a_page_has_the_address_that_nbdev_gives_it():
    from edgenb._modidx import d
    targets = {e.target for e in book.entries()}
    for module, symbols in d['syms'].items():
        for at, _ in symbols.values(): assert at.split('#')[0].removesuffix('.html') in targets, f'{module} is documented at {at}'


def test_a_page_is_executed_anew_when_its_notebook_or_what_it_reaches_changes(tmp_path):
    nb = lambda source: (tmp_path/'a.ipynb').write_text(json.dumps(notebook(code(source)))) and tmp_path/'a.ipynb'
    one, again, other, smoke = book.key(nb('from edgenb.gas import duval'), False), book.key(nb('from edgenb.gas import duval'), False), book.key(nb('from edgenb.gas import duval\n1'), False), book.key(nb('from edgenb.gas import duval'), True)
    assert one == again and len({one, other, smoke}) == 3
    assert 'edgenb.gas' in book.reached('from edgenb.gas import duval') and 'edgenb.core' in book.reached('from edgenb.ship import ship') and book.reached('import numpy') == {}


@pytest.fixture
def three(tmp_path, monkeypatch):
    "Three notebooks, the second of which fails; what was executed is told in a list."
    done = []
    def execute(source, threads, root=None):
        done.append(source.stem)
        text = source.read_text()
        if 'interrupt' in text: raise KeyboardInterrupt
        return json.loads(text) | {'metadata': {'book': {'ok': 'fails' not in text, 'error': '', 'seconds': 0.0}}}
    monkeypatch.setattr(book, 'execute_chapter', execute)
    def write(name, source): (tmp_path/f'{name}.ipynb').write_text(json.dumps(notebook(code(source)))); return book.Entry(tmp_path/f'{name}.ipynb', name, name, 'x')
    found = [write('a', 'x = 1'), write('b', 'fails = 1'), write('c', 'x = 3')]
    def build(workers=2, only=()): done.clear(); made = book.execute(found, tmp_path/'cache', False, workers, list(only)); return sorted(done), made
    return build, write


def test_a_second_build_executes_only_what_changed_or_failed(three):
    build, write = three
    assert build()[0] == ['a', 'b', 'b', 'c']                 # what fails beside others is tried once more alone
    assert build()[0] == ['b', 'b'] and build(workers=1)[0] == ['b']
    write('c', 'x = 4')
    executed, made = build(only=['a'])
    assert executed == [] and made['c']['metadata']['book']['stale'] and 'stale' not in made['a']['metadata']['book']
    assert build(workers=1)[0] == ['b', 'c'] and write('b', 'x = 2') and build()[0] == ['b'] and build()[0] == []


def test_an_interrupted_build_goes_on_where_it_was(three):
    build, write = three
    write('b', 'interrupt = 1')
    with pytest.raises(KeyboardInterrupt): build(workers=1)
    write('b', 'x = 2')
    executed, made = build(workers=1)
    assert 'b' in executed and 'a' not in executed and all(nb['metadata']['book']['ok'] for nb in made.values())


def commands():
    "(where, line) of every `edgenb ...` in the README and the how-to pages."
    for p in [ROOT/'README.md', *sorted((ROOT/'docs'/'howto').glob('*.md')), ROOT/'docs'/'site'/'index.md']:
        text = p.read_text(encoding='utf-8')
        blocks = re.findall(r'^\s*```[^\n]*\n(.*?)^\s*```', text, re.S | re.M)
        lines = [l.strip() for b in blocks for l in b.splitlines()] + re.findall(r'`(edgenb [^`]+)`', re.sub(r'```.*?```', '', text, flags=re.S))
        yield from ((p.name, l) for l in lines if l.startswith('edgenb ') and '…' not in l)


@pytest.mark.parametrize('where, line', sorted(set(commands())))
def test_every_command_in_the_documentation_is_one(where, line):
    from edgenb.cli import COMMANDS, parser
    from edgenb.mill import parameters, recipe
    from edgenb.weights import bundled
    words = shlex.split(re.split(r'\s{2,}#| > ', line)[0].replace('...', ''))[1:]
    if len(words) == 1 and words[0] in COMMANDS: return   # the command by its name
    try: args = parser().parse_args(words)
    except SystemExit: pytest.fail(f'{where}: {line} is not a command')
    if words[0] == 'run' and args.recipe != 'my-recipe': assert {n for n, _ in args.parameters} <= set(parameters(recipe(args.recipe))), f'{where}: {line}'
    if words[0] == 'weights': assert set(args.names) <= set(bundled())
    if words[0] == 'fit' and args.device:
        from edgenb.device import devices
        assert args.device in devices()


DOCUMENTED = 0.94   # share of public names with a docstring and of parameters with a type or a comment; it may only rise


def test_what_is_public_is_documented():
    found, total = documented.gaps()
    assert 1 - len(found)/total >= DOCUMENTED, '\n'.join(found)


def test_the_gate_of_the_reference_sees_what_is_missing():
    found, total = documented.gaps_of('__all__ = ["a", "B"]\ndef a(x,\n      y: int, z, w  # of it\n     ):\n    "About `z`."\ndef _p(q): pass\nclass B:\n    def m(self, k): pass\n')
    assert [f.split(': ')[1] for f in found] == ['a(x) has neither type nor comment', 'B has no docstring', 'B.m has no docstring', 'B.m(k) has neither type nor comment'] and total == 8


# ---- a small book

SLIDER = """import ipywidgets as w
box = w.VBox([a := w.IntSlider(value=3, description='level'), b := w.IntText(value=3)]); w.jslink((a, 'value'), (b, 'value')); box"""
PLOT = """import plotly.graph_objects as go
go.Figure(go.Bar(x=['good', 'dented'], y=[9, 2]), layout=dict(title='Lids', xaxis_title='class', yaxis_title='count', width=640, height=320))"""


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A book of three notebooks, one of which fails, and a page of text: (its folder, the entries, what was executed, problems)."
    if importlib.util.find_spec('smalldocs') is None: pytest.skip("smalldocs is not installed: pip install 'edgenb[docs]'")
    root = tmp_path_factory.mktemp('book')
    def write(name, *cells): nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(c[3:]) if c.startswith('md:') else nbformat.v4.new_code_cell(c) for c in cells], metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}), root/name); return root/name
    a = write('00_lids.ipynb', 'md:# Lids\n\n> Dented lids are found.', f'md:See [other](01_other.ipynb#a-heading) & `x<y`. Costs $1 and $2.\n\n{"| a " * 30}|\n{"|---" * 30}|\n{"| number " * 30}|', PLOT, '#| export\ndef dent(depth: float  # mm\n        ): \n    "Is it one?"\n    return depth > 1', "print('<script>window.harmed=1</script>')")
    b = write('01_other.ipynb', 'md:# Other\n\n> A kumquat among lids.', 'md:## A heading\n\nAbout the kumquat.', SLIDER)
    c = write('02_broken.ipynb', 'md:# Broken', '1/0', "print('never')")
    (root/'text.md').write_text('# Some text\n\nBack to [the lids](00_lids.ipynb).\n')
    found = [book.Entry(p, n, n, 'Start') for p, n in ((a, 'lids'), (b, 'other'), (c, 'broken'), (root/'text.md', 'text'))]
    (root/'index.md').write_text('---\ntitle: "Small"\n---\n\n[lids](00_lids.ipynb)\n')
    made = {e.target: book.execute_chapter(e.source, 1) for e in found if e.kind != 'text'}
    problems = book.assemble(found, made, root/'site', root/'cache', root/'out', api=False, front=root/'index.md')
    book.render(root/'site', root/'out')
    return root/'out', found, made, problems


def test_a_small_book_has_no_dead_link_and_asks_for_nothing_from_outside(small):
    out, _, _, problems = small
    assert problems == [] and book.check(out) == []
    lids = (out/'lids.html').read_text()
    assert '<script>window.harmed' not in lids and '&lt;script&gt;window.harmed' in lids and 'katex' not in lids and '$1 and $2' in lids
    assert 'href="other.html#a-heading"' in lids and 'lids.llms.md' in (out/'llms.txt').read_text() and '*Plot: Lids*' in (out/'lids.llms.md').read_text() and '=html' not in (out/'lids.llms.md').read_text() and (out/'static'/'search.js').read_text().startswith('window.edgenbSearch=[')


def test_the_check_finds_dead_links_missing_places_and_what_would_be_loaded(small, tmp_path):
    shutil.copytree(small[0], tmp_path/'out')
    (tmp_path/'out'/'text.html').write_text('<a href="gone.html"></a><a href="other.html#nowhere"></a><a href="https://fine.org"></a><img src="https://cdn.org/x.png"><script src="//cdn.org/x.js"></script><link href="http://cdn.org/x.css" rel="stylesheet">'
                                            '<script>fetch("https://cdn.org/j")</script><style>@import url(https://fonts.org/f)</style><p style="background:url(https://cdn.org/b)"></p>')
    (tmp_path/'out'/'book.css').write_text('a{background:url("https://cdn.org/b.png")}')
    found = [p for p in book.check(tmp_path/'out') if p.startswith(('text', 'book'))]
    assert len(found) == 9 and sum('leads nowhere' in p for p in found) == 1 and sum('no such place' in p for p in found) == 1 and not any('fine.org' in p for p in found)


def test_a_page_that_fails_is_shown_with_its_error(small):
    out, _, made, _ = small
    assert not made['broken']['metadata']['book']['ok'] and 'ZeroDivisionError' in made['broken']['metadata']['book']['error'] and made['lids']['metadata']['book']['ok']
    text = (out/'broken.html').read_text()
    assert 'This page stopped with an error' in text and 'ZeroDivisionError' in text and '<code>never' not in text


def test_an_error_above_a_page_names_no_folder_of_this_machine(tmp_path):
    pytest.importorskip('smalldocs')
    e = book.Entry(ROOT/'nbs'/'00_core.ipynb', 'core', 'core', 'Start')
    facts = {'ok': False, 'error': f'EdgenbError: {ROOT}/runs/x is not a run', 'started': '2026-01-31T10:00:00+00:00', 'seconds': 1.0, 'environment': {'python': '3.11.9', 'system': 'Linux', 'machine': 'x86_64', 'cpus': 2, 'libraries': {}}}
    book.assemble([e], {'core': notebook(words('# Core'), book=facts)}, tmp_path/'site', tmp_path/'cache', tmp_path/'out', api=False)
    page = (tmp_path/'site'/'core.ipynb').read_text()
    assert 'EdgenbError: runs/x is not a run' in page and str(ROOT) not in page


def test_a_recipe_page_says_when_and_where_and_a_smoke_page_that_it_means_nothing():
    e = book.Entry(ROOT/'nbs'/'recipes'/'wafer.ipynb', 'recipes/wafer', 'Wafer', 'Recipes')
    facts = {'ok': True, 'error': '', 'started': '2026-01-31T10:00:00+00:00', 'seconds': 600.0, 'data': 'real', 'run': 'wafer/x', 'machines': [('Linux-6.1-x86_64', 2)], 'environment': {'python': '3.11.9', 'system': 'Linux', 'machine': 'x86_64', 'cpus': 2, 'libraries': {'torch': '2.9', 'cleanlab': '1'}}}
    above, _ = book.around(e, facts)
    assert '31 January 2026, 10:00 UTC, on Linux x86_64 with 2 processor cores; Python 3.11.9, torch 2.9' in above and 'on **real** data' in above and '10 minutes' in above
    assert '**synthetic**' in book.around(e, facts | {'data': 'synthetic'})[0]
    smoke, _ = book.around(e, facts | {'smoke': True})
    assert 'the numbers on this page mean nothing' in smoke and 'measured by this notebook' not in smoke
    assert 'Not executed' in book.around(e, {})[0]


chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.fixture(scope='session')
def browser_type_launch_args(browser_type_launch_args): return {**browser_type_launch_args, 'executable_path': chromium, 'args': ['--no-sandbox', '--allow-file-access-from-files=false']}


@pytest.fixture
def served(small):
    "The small book's address."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(small[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.mark.browser
@pytest.mark.skipif(chromium is None, reason='no Chromium on this machine (Debian: apt-get install chromium)')
@pytest.mark.parametrize('way', ['served', 'from a disk'])
def test_the_book_in_a_browser(page, served, small, way):
    from playwright.sync_api import expect
    at, asked, errors = served if way == 'served' else small[0].as_uri(), [], []
    page.on('request', lambda r: asked.append(r.url)); page.on('pageerror', lambda e: errors.append(str(e)))
    for width in (1280, 390):
        page.set_viewport_size({'width': width, 'height': 900})
        page.goto(f'{at}/lids.html')
        expect(page.locator('.edgenb-plot .main-svg').first).to_be_visible(timeout=20_000)             # plotly draws
        assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth'), f'the page is wider than {width}'   # wide tables scroll by themselves
    page.set_viewport_size({'width': 1280, 'height': 900})
    before = page.evaluate('getComputedStyle(document.body).backgroundColor')
    page.locator('.quarto-color-scheme-toggle').first.click()
    page.wait_for_function('before => getComputedStyle(document.body).backgroundColor != before', arg=before)
    expect(page.locator('html')).to_have_class(re.compile('quarto-dark'))
    page.locator('.smalldocs-search input').first.fill('kumquat')
    expect(page.locator('.search-result').first).to_contain_text('Other', timeout=10_000)
    page.goto(f'{at}/other.html')
    number = page.locator('.edgenb-widget input[type=number]')
    expect(number).to_have_value('3', timeout=20_000)
    page.locator('.edgenb-widget .noUi-handle').first.focus(); page.keyboard.press('ArrowRight')
    expect(number).to_have_value('4')                                                                   # linked without a kernel
    assert page.evaluate('window.harmed') is None and not errors and all(u.startswith((at, 'data:', 'blob:')) for u in asked), [u for u in asked if not u.startswith(at)]
