"Turns an executed notebook into a page that needs nothing from outside: a pure function of the notebook, tried by tests/test_book.py."
import ast, base64, hashlib, html, json, posixpath, re
from dataclasses import dataclass, field

PLOTLY, VIEW, STATE = 'application/vnd.plotly.v1+json', 'application/vnd.jupyter.widget-view+json', 'application/vnd.jupyter.widget-state+json'
PICTURES = {'image/png': 'png', 'image/jpeg': 'jpg', 'image/gif': 'gif'}
SKIPPED = {'slow': 'it takes long', 'eval: false': 'it is not meant to be'}   # directive -> why a cell was not run


@dataclass
class Page:
    "What a notebook becomes."
    notebook: dict                                   # nbformat 4, as smalldocs reads it
    title: str
    lead: str                                        # one sentence
    assets: dict = field(default_factory=dict)       # path in the site -> bytes
    problems: list = field(default_factory=list)     # links that lead nowhere


def text_of(value) -> str:
    "A notebook's string, which may be stored as a list of lines."
    return ''.join(value) if isinstance(value, list) else value or ''


def directives(source: str) -> tuple:   # (dict of them, the source without them)
    "nbdev's and Quarto's `#| name: value` lines, wherever they stand in a cell."
    found, rest = {}, []
    for line in source.splitlines():
        told = re.match(r'\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$', line)
        if told: found[told[1]] = told[2].strip()
        elif not re.search(r'#\s*\|\s*hide_line\s*$', line): rest.append(line)
    return found, '\n'.join(rest).strip('\n')


def not_run(source: str) -> str | None:
    "Why a cell is left out when the book is executed; None where it is run."
    told = directives(source)[0]
    return next((why for d, why in SKIPPED.items() if (k := d.split(':')[0]) in told and (':' not in d or told[k] == 'false')), None)


def headline(cells: list) -> tuple:   # (title, lead); takes them out of the cells
    "The `# title` and `> sentence` that a notebook begins with."
    for cell in [c for c in cells if c['cell_type'] == 'markdown'][:2]:
        source = text_of(cell['source'])
        if not (title := re.match(r'\s*# +(.+?)\s*$', source, re.M)): continue
        source = source[title.end():]
        if lead := re.match(r'\s*((?:^>.*\n?)+)', source, re.M): source = source[lead.end():]
        cell['source'] = source.strip('\n')
        return title[1], ' '.join(re.sub(r'^> ?', '', lead[1], flags=re.M).split()) if lead else ''
    return '', ''


def relink(text: str, source: str, pages: dict, problems: list) -> str:
    "Point the links of Markdown, written for the repository, at the pages of the site; what has no page keeps its words only."
    def one(found):
        label, target = found[1], found[2].strip()
        if re.match(r'[a-z][\w+.-]*:|#|/', target): return found[0]
        path, mark, anchor = target.partition('#')
        for place in (posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), posixpath.normpath(path)):
            if place in pages: return f'{label}(/{pages[place]}{mark}{anchor})'
        if path.endswith('.html'): return found[0]           # nbdev's own addresses: the pages have the same
        problems.append(f'{source}: nothing in the book is {target}')
        return label[1:-1]
    parts = re.split(r'(^ {0,3}```.*?^ {0,3}```[^\n]*$|`[^`\n]+`)', text, flags=re.S | re.M)   # code stays as it is
    for i in range(0, len(parts), 2): parts[i] = re.sub(r'(?<!!)(\[[^\]\[]*\])\(([^()\s]+)\)', one, parts[i])
    joined = ''.join(parts)                                  # a link whose words are code was cut in two
    return re.sub(r'(\[`[^`\]\n]+`\])\(([^()\s]+)\)', one, joined)


def harmless(text: str) -> str:
    "Markdown that code has printed, its raw HTML as words: a file's name or a label may be in it."
    text = re.sub(r'^([ >]*(?:`{3,}|~{3,})[^\n{]*)\{[^\n]*$', r'\1', text, flags=re.M)   # ```{=html}
    parts = re.split(r'(^ {0,3}```.*?^ {0,3}```[^\n]*$|(?<![\\`])`[^`\n]+`(?!`))', text, flags=re.S | re.M)   # code stays as it is
    for n in range(0, len(parts), 2):
        parts[n] = re.sub(r'(?<!\\)<(?=[A-Za-z/!?<])', '&lt;', parts[n])
        parts[n] = re.sub(r'(?:\A|(?<=[\])`*_]))\{|\{(?=[^{}\n]*\}\s*$)', '&#123;', parts[n], flags=re.M)   # attributes, of which onclick is one
    return ''.join(parts)


def signature(node) -> str:
    "A function's or class's name and arguments, without types."
    if isinstance(node, ast.ClassDef): return node.name
    a, bare = node.args, lambda args: [ast.arg(x.arg) for x in args]
    plain = ast.arguments(bare(a.posonlyargs), bare(a.args), a.vararg and ast.arg(a.vararg.arg), bare(a.kwonlyargs), a.kw_defaults, a.kwarg and ast.arg(a.kwarg.arg), a.defaults)
    return f'{node.name}({ast.unparse(plain)})'


def definitions(code: str) -> list:   # of (name, signature, first line of the docstring)
    "The public functions and classes that a cell defines."
    try: tree = ast.parse(code)
    except SyntaxError: return []
    return [(n.name, signature(n), (ast.get_docstring(n) or '').split('\n')[0]) for n in tree.body
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not n.name.startswith('_')]


def escaped(text: str) -> str:
    "Text as Markdown; what stands in backticks is code, all else is words."
    parts = re.split(r'(`[^`]+`)', text)
    return ''.join(t if n % 2 else re.sub(r'([\\*_<>\[\]{}#|~^$])', r'\\\1', t) for n, t in enumerate(parts))


def defined(code: str, module: str, symbols: dict) -> tuple:   # (Markdown above the code, or '', the summary of the folded code)
    "What an exported cell gives the reader before the code: names, arguments, one line each, with links to the reference."
    rows = []
    for name, told, doc in definitions(code):
        at, ticks = symbols.get(f'edgenb.{module}.{name}', ''), '``' if '`' in told else '`'
        shown = f'{ticks}{told}{ticks}'
        rows.append((f'[{shown}]({at})' if at else shown) + (f'\\\n{escaped(doc)}' if doc else ''))
    try: imports = bool(code) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(code).body)
    except SyntaxError: imports = False
    return ('::: {.defines}\n' + '\n\n'.join(rows) + '\n:::' if rows else ''), 'Imports' if imports else 'Source'


def plot(figure: dict, still: str | None, up: str, assets: dict) -> str:
    "A plotly figure: its still picture, which the page's script makes live when it is looked at."
    if any(re.search(r'map|geo|choropleth', t.get('type', '').replace('heatmap', '').replace('treemap', '')) for t in figure.get('data', [])):   # maps are loaded from a server
        return f'<img src="{up}{still}" alt="Map" loading="lazy">' if still else '<p>A map, which would be loaded from a server, is left out.</p>'
    layout = {k: v for k, v in figure.get('layout', {}).items() if k not in ('width', 'template')}   # as wide as the page; colours of the page
    body = json.dumps({'data': figure.get('data', []), 'layout': layout}, separators=(',', ':'), ensure_ascii=False)
    name = hashlib.sha256(body.encode()).hexdigest()[:16]
    assets[f'plots/{name}.js'] = f'edgenbPlot("{name}",{body})\n'.encode()
    height = int(figure.get('layout', {}).get('height') or 400)
    title = figure.get('layout', {}).get('title') or {}
    alt = re.sub(r'<br ?/?>', ' ', str(title.get('text', '') if isinstance(title, dict) else title)) or 'Plot'
    picture = f'<img src="{up}{still}" alt="{html.escape(alt)}" loading="lazy">' if still else f'<noscript>This plot needs JavaScript: {html.escape(alt)}</noscript>'
    return f'<div class="edgenb-plot" data-plot="{name}" data-src="{up}plots/{name}.js" data-height="{height}" role="img" aria-label="{html.escape(alt)}">{picture}</div>'


def picture(data: str, mime: str, assets: dict) -> str:   # its path in the site
    "Keep a picture as a file of its own."
    raw = base64.b64decode(text_of(data))
    path = f'pictures/{hashlib.sha256(raw).hexdigest()[:16]}.{PICTURES[mime]}'
    assets[path] = raw
    return path


def settled(text: str) -> str:
    "What a terminal would show of text that overwrites itself: of a progress bar only its end."
    return '\n'.join(line.rstrip('\r').split('\r')[-1] for line in text.split('\n'))


def bar_only(model: str, state: dict) -> bool:
    "Whether a widget is a progress bar, which nothing moves any more."
    models = state.get('state', {})
    todo, seen = [model], set()
    while todo:
        m = todo.pop()
        if m in seen or m not in models: continue
        seen.add(m)
        if models[m].get('model_name') in ('FloatProgressModel', 'IntProgressModel'): return True
        todo += re.findall(r'IPY_MODEL_(\w+)', json.dumps(models[m].get('state', {}).get('children', [])))
    return False


def output(out: dict, state: dict, up: str, assets: dict, live: list) -> dict | None:
    "One output as the site shows it; None for nothing. Widgets that stay alive are added to `live`."
    kind = out.get('output_type')
    if kind == 'stream':
        text = settled(text_of(out.get('text')))
        return {**out, 'text': text} if text.strip() else None
    if kind == 'error':
        known = out.get('ename') == 'EdgenbError'            # a message for people: no traceback
        return {**out, 'traceback': [f"{out.get('ename')}: {out.get('evalue')}"]} if known else out
    data = out.get('data') or {}
    plain = text_of(data.get('text/plain'))
    mime = next((m for m in PICTURES if m in data), None)
    shown = None
    if PLOTLY in data: shown = plot(data[PLOTLY], picture(data[mime], mime, assets) if mime else None, up, assets)
    elif VIEW in data:
        model = data[VIEW].get('model_id', '')
        if bar_only(model, state) or re.search(r'\d+%\|', plain): return None   # a bar that stands still says nothing
        if model in state.get('state', {}):
            live.append(model)
            shown = f'<div class="edgenb-widget" data-model="{html.escape(model)}"><pre>{html.escape(plain)}</pre></div><p class="widget-note">Without a kernel: what is linked in the browser moves, the rest stands still.</p>'
        elif re.match(r'\w+\(', plain): return None           # nothing but the name of a class
        else: return {'output_type': 'display_data', 'metadata': {}, 'data': {'text/plain': plain}} if plain.strip() else None
    elif 'text/html' not in data and mime:
        alt = '' if plain.startswith('<') or not plain else plain
        shown = f'<img src="{up}{picture(data[mime], mime, assets)}" class="img-fluid" alt="{html.escape(alt or "Picture made by the cell above")}" loading="lazy">'
    if shown is None:
        keep = {k: v for k, v in data.items() if k in ('text/html', 'text/markdown', 'image/svg+xml', 'text/latex', 'text/plain')}
        if 'text/markdown' in keep: keep['text/markdown'] = harmless(text_of(keep['text/markdown']))
        return {'output_type': 'display_data', 'metadata': {}, 'data': keep} if keep else None
    return {'output_type': 'display_data', 'metadata': {}, 'data': {'text/html': shown}}


def code_cell(cell: dict, module: str, symbols: dict, up: str, state: dict, assets: dict, live: list, execute: bool) -> list:   # of cells
    "A code cell as the site shows it: directives obeyed, exported code folded below what it defines."
    told, code = directives(text_of(cell['source']))
    off = lambda *names: any(told.get(n) == 'false' for n in names)
    if 'default_exp' in told or 'hide' in told or off('include'): return []
    tags, top, above = [], [], []
    if 'hide_input' in told or off('echo'): tags.append('remove-input')
    if 'hide_output' in told or off('output'): tags.append('remove-output')
    if not code.strip(): return []
    if any(n in told for n in ('export', 'exporti', 'exec_doc')) and 'remove-input' not in tags:
        before, summary = defined(code, module, symbols)
        if before: above.append({'cell_type': 'markdown', 'metadata': {}, 'source': before})
        top = ['#| code-fold: true', f'#| code-summary: {summary}']
    elif 'code-fold' in told: top = [f"#| code-fold: {told['code-fold'] or 'true'}"]
    if 'code-summary' in told: top = [t for t in top if 'summary' not in t] + [f"#| code-summary: {told['code-summary']}"]
    outputs = [o for o in (output(o, state, up, assets, live) for o in cell.get('outputs', [])
                           if not (off('warning') and o.get('name') == 'stderr') and not (o.get('output_type') == 'stream' and any(w in text_of(o.get('text')) for w in told.get('filter_stream', '').split()))) if o]
    cells = above + [{'cell_type': 'code', 'metadata': {'tags': tags}, 'execution_count': None, 'source': '\n'.join([*top, code]), 'outputs': outputs}]
    if execute and (why := not_run(text_of(cell['source']))):
        cells.append({'cell_type': 'markdown', 'metadata': {}, 'source': f'::: {{.not-run}}\nThis cell was not run for the book: {why}.\n:::'})
    return cells


def page(notebook: dict,       # executed, nbformat 4
         source: str,          # its path in the repository
         target: str,          # its path in the site, without ending
         pages: dict,          # path in the repository -> path in the site
         symbols: dict = {},   # name -> address in the reference
         above: str = '',      # Markdown for the top of the page
         below: str = '',      # and for its end
         title: str = ''       # instead of the notebook's own
        ) -> Page:
    "The page that shows a notebook."
    cells = json.loads(json.dumps(notebook['cells']))
    up, state, live, out = '../'*target.count('/'), (notebook.get('metadata', {}).get('widgets') or {}).get(STATE, {}), [], []
    own, lead = headline(cells)
    found = Page({}, title or own or target.rsplit('/', 1)[-1], lead)
    module = next((told['default_exp'] for c in cells if c['cell_type'] == 'code' and 'default_exp' in (told := directives(text_of(c['source']))[0])), '')
    for cell in cells:
        if cell['cell_type'] == 'markdown':
            text = relink(text_of(cell['source']), source, pages, found.problems)
            if text.strip(): out.append({'cell_type': 'markdown', 'metadata': {}, 'source': text} | ({'attachments': cell['attachments']} if cell.get('attachments') else {}))
        elif cell['cell_type'] == 'code' and 'papermill-error-cell-tag' not in cell.get('metadata', {}).get('tags', []):
            out += code_cell(cell, module, symbols, up, state, found.assets, live, True)
    if live:
        body = json.dumps(state, ensure_ascii=False, separators=(',', ':'))
        name = hashlib.sha256(body.encode()).hexdigest()[:16]
        found.assets[f'widgets/{name}.js'] = f'window.edgenbWidgets={body}\n'.encode()
        out.append({'cell_type': 'markdown', 'metadata': {}, 'source': f'```{{=html}}\n<div id="edgenb-widget-state" data-src="{up}widgets/{name}.js" hidden></div>\n```'})
    front = f'---\ntitle: {json.dumps(found.title, ensure_ascii=False)}\n' + (f'description: {json.dumps(lead, ensure_ascii=False)}\n' if lead else '') + '---'
    extra = [{'cell_type': 'markdown', 'metadata': {}, 'source': s} for s in (above,) if s]
    last = [{'cell_type': 'markdown', 'metadata': {}, 'source': s} for s in (below,) if s]
    found.notebook = {'nbformat': 4, 'nbformat_minor': 5, 'metadata': {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}},
                      'cells': [{'cell_type': 'raw', 'metadata': {}, 'source': front}, *extra, *out, *last]}
    return found
