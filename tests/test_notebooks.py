"Every notebook runs, and nothing is left to export, clean or write."
import ast, json, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).parents[1]
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if p.parent.name != 'recipes')   # the recipes run through papermill, see test_recipes.py


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook_runs(path):
    from nbdev.test import test_nb as run_notebook
    passed, _ = run_notebook(path, skip_flags=['slow'], basepath=root)
    assert passed


@pytest.mark.parametrize('command', ['nbdev-export', 'nbdev-clean'])
def test_nothing_is_left_to_export_or_clean(command):
    def tree(): return {p: p.read_bytes() for d in ('nbs', 'edgenb') for p in (root/d).rglob('*') if p.suffix in ('.py', '.ipynb')}
    before = tree()
    subprocess.run([Path(sys.executable).parent/command], cwd=root, check=True)
    assert tree() == before, f'run {command} and commit'


def test_readme_is_made_from_the_index_notebook():
    sys.path.insert(0, str(root/'docs'))
    try: from make_readme import readme
    finally: sys.path.pop(0)
    assert (root/'README.md').read_text(encoding='utf-8') == readme(), 'run make readme and commit'


@pytest.mark.parametrize('path', sorted((root/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_notebook_is_committed_without_outputs_and_imports_apart(path):
    cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    assert not any(c['outputs'] for c in cells)
    for source in (''.join(c['source']) for c in cells):
        lines = ast.parse('\n'.join('pass' if l.lstrip().startswith(('%', '!')) else l for l in source.splitlines())).body
        imports = [l for l in lines if isinstance(l, (ast.Import, ast.ImportFrom))]
        setting_up = all(isinstance(l, (ast.Import, ast.ImportFrom)) or ast.unparse(l).startswith('os.environ') for l in lines)
        assert not imports or setting_up, f'imports need a cell of their own: {source[:80]}'


def test_each_recipe_has_one_parameters_cell_and_the_eight_headings():
    for path in (root/'nbs'/'recipes').glob('*.ipynb'):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        assert sum('parameters' in c['metadata'].get('tags', []) for c in cells) == 1
        headings = [l[3:] for c in cells if c['cell_type'] == 'markdown' for l in ''.join(c['source']).splitlines() if l.startswith('## ')]
        rooms = ['Data', 'Tune', 'Squeeze', 'Compile', 'Verify', 'Ship', 'Watch', 'Learn']
        assert [h for h in headings if h in rooms] == rooms
