"""How much of what edgenb offers is documented: `python docs/documented.py` lists every gap.

Every public name has a docstring; every parameter of a public function or method has a type, a comment beside it, or stands in backticks in the docstring.
"""
import ast, io, sys, tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED_ON = {'self', 'cls', 'run'}   # the run is every room's first argument


def _functions(tree: ast.Module, public: set):
    "(name, node) of public functions, classes and their public methods."
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name not in public: continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from ((f'{node.name}.{m.name}', m) for m in node.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef)) and not m.name.startswith('_'))


def gaps_of(text: str, module: str = '') -> tuple:   # (gaps in words, how many names and parameters there are)
    "What one module's source leaves unsaid."
    tree = ast.parse(text)
    comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
    named = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__'), None)
    public = set(named) if named is not None else {n.name for n in tree.body if hasattr(n, 'name') and not n.name.startswith('_')}
    found, total = [], 0
    for name, node in _functions(tree, public):
        doc = ast.get_docstring(node) or ''
        total += 1
        inherited = '.' in name and any(not isinstance(b, ast.Name) or b.id != 'object' for b in next(n for n in tree.body if getattr(n, 'name', '') == name.split('.')[0]).bases)
        if not doc and not inherited and not any(getattr(d, 'id', '') in ('property', 'cached_property') for d in node.decorator_list): found.append(f'{module}: {name} has no docstring')
        if isinstance(node, ast.ClassDef) or inherited: continue
        for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if a.arg in PASSED_ON: continue
            total += 1
            if a.annotation is None and a.lineno not in comments and f'`{a.arg}`' not in doc: found.append(f'{module}: {name}({a.arg}) has neither type nor comment')
    return found, total


def gaps(root: Path = ROOT) -> tuple:   # (gaps, total)
    "What the package leaves unsaid."
    found, total = [], 0
    for p in sorted((root/'edgenb').rglob('*.py')):
        if p.name == '_modidx.py': continue
        some, n = gaps_of(p.read_text(encoding='utf-8'), p.relative_to(root).with_suffix('').as_posix().replace('/', '.'))
        found += some; total += n
    return found, total


if __name__ == '__main__':
    found, total = gaps()
    print('\n'.join(found))
    print(f'{total - len(found)} of {total} names and parameters are documented')
    sys.exit(bool(found))
