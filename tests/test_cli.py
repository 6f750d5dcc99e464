"The edgenb command, from the outside."
import json, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).parents[1]
edgenb = Path(sys.executable).parent/'edgenb'


def call(*args, cwd=root): return subprocess.run([edgenb, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def refused(done, *says):
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and 'Traceback' not in done.stderr, done.stderr
    assert done.stderr.startswith('edgenb: ') and all(s in done.stderr for s in says), done.stderr


@pytest.mark.parametrize('args', [['--help'], ['run', '--help'], ['--version'], []])
def test_help_loads_no_heavy_library(args):
    heavy = "torch numpy PIL pandas papermill nbformat scipy sklearn transformers onnxruntime".split()
    code = f"import sys; from edgenb.cli import main\ntry: main({args!r})\nexcept SystemExit: pass\nprint([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stderr.strip() == '[]', done.stderr


@pytest.mark.parametrize('module', ['edgenb', 'edgenb.core', 'edgenb.pipeline', 'edgenb.data', 'edgenb.tune', 'edgenb.squeeze', 'edgenb.compile', 'edgenb.runtime', 'edgenb.search', 'edgenb.bisect', 'edgenb.choice', 'edgenb.device', 'edgenb.size', 'edgenb.remote', 'edgenb.verify', 'edgenb.ship',
                                    'edgenb.watch', 'edgenb.learn', 'edgenb.mill', 'edgenb.panel', 'edgenb.doctor', 'edgenb.recipes.wafer'])
def test_modules_load_no_torch(module):
    done = subprocess.run([sys.executable, '-c', f"import sys, {module}; assert not {{'torch', 'transformers', 'peft', 'sklearn'}} & set(sys.modules)"], cwd=root)
    assert done.returncode == 0


def test_recipes_are_listed_with_what_they_give(): assert 'wafer' in call('recipes').stdout


def test_parameters_are_listed_with_type_and_help():
    out = call('run', 'wafer', '--help-notebook').stdout
    assert "method: str = 'full'" in out and 'one of full, lora, head' in out


@pytest.mark.parametrize('given, says', [(['-p', 'sede', '1'], 'Did you mean seed'), (['-p', 'seed', 'one'], 'whole number'), (['-p', 'method', 'lore'], 'Did you mean lora'),
                                         (['-p', 'tolerance', 'wide'], 'a number'), (['-p', 'smoke', 'perhaps'], 'true or false'), (['-y', 'seed: [1]'], 'whole number'),
                                         (['-y', 'nonsense'], 'name: value'), (['-f', 'no-such-file.yaml'], 'cannot be read')])
def test_wrong_parameters_are_refused_before_anything_starts(given, says):
    before = set((root/'runs').rglob('*')) if (root/'runs').exists() else set()
    refused(call('run', 'wafer', *given), says)
    assert (set((root/'runs').rglob('*')) if (root/'runs').exists() else set()) == before   # not even a folder


def test_an_unknown_recipe_is_refused(): refused(call('run', 'wafre'), 'Did you mean wafer')
def test_a_file_that_is_no_notebook_is_refused(tmp_path):
    (tmp_path/'x.ipynb').write_text('hello')
    refused(call('run', tmp_path/'x.ipynb'), 'is not a notebook')


def test_compare_without_runs_says_so(tmp_path): refused(call('compare', tmp_path/'runs'), 'nothing has been run yet')
def test_a_folder_that_is_no_bundle_is_refused(tmp_path): refused(call('predict', tmp_path, 'x.png'), 'is not a bundle')


def test_prepare_only_writes_the_notebook_with_its_parameters(tmp_path):
    done = call('run', 'wafer', '-p', 'seed', '7', '-p', 'output_dir', tmp_path/'run', '--prepare-only', '--json')
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])['path'] == str(tmp_path/'run')
    cells = json.loads((tmp_path/'run'/'wafer.ipynb').read_text())['cells']
    injected = next(''.join(c['source']) for c in cells if 'injected-parameters' in c['metadata'].get('tags', []))
    assert 'seed = 7' in injected and not any(c.get('outputs') for c in cells)


def test_an_error_in_a_room_is_one_line_and_keeps_the_notebook(tmp_path):
    (tmp_path/'empty').mkdir()
    done = call('run', 'wafer', '-p', 'source', tmp_path/'empty', '-p', 'output_dir', tmp_path/'run', '--no-progress')
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('edgenb: ') and 'holds no images' in done.stderr.splitlines()[-1]
    assert str(root/'edgenb') not in done.stderr.replace(done.stderr.splitlines()[-1], '')   # no line of ours in a traceback; a kernel that is shut down on a busy machine may log one of its own
    assert (tmp_path/'run'/'wafer.ipynb').exists() and not list((tmp_path/'run').glob('01-*'))


def test_a_batch_run_keeps_what_widgets_say_as_text_and_not_their_state(tmp_path):
    import nbformat
    source = "from IPython.display import HTML, display\nfrom tqdm.notebook import tqdm\nfor _ in tqdm(range(3), desc='weighing'): pass\ndisplay(HTML('<b>a table</b>'))"
    cells = [nbformat.v4.new_code_cell("output_dir: str = ''  # of this run", metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}), tmp_path/'bars.ipynb')
    done = call('run', tmp_path/'bars.ipynb', '-p', 'output_dir', tmp_path/'run')
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(tmp_path/'run'/'bars.ipynb', 4)
    shown = [o.data for o in notebook.cells[-1].outputs if 'data' in o]
    assert 'widgets' not in notebook.metadata and any('weighing' in d['text/plain'] for d in shown) and shown[-1]['text/html'] == '<b>a table</b>'


def test_the_workspace_settings_decide_where_runs_go(tmp_path):
    (tmp_path/'settings.ini').write_text('[runs]\nfolder = elsewhere\n')
    done = call('run', root/'nbs'/'recipes'/'wafer.ipynb', '--prepare-only', cwd=tmp_path)
    assert done.returncode == 0 and Path(done.stdout.splitlines()[-1]).parent == tmp_path/'elsewhere'/'wafer'
    (tmp_path/'settings.ini').write_text('[gates]\ntolerence = 0.1\n')
    refused(call('run', root/'nbs'/'recipes'/'wafer.ipynb', cwd=tmp_path), 'Did you mean [gates] tolerance')


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_a_shell_can_complete_commands_and_options(shell, tmp_path):
    import shutil
    script = call('completion', shell).stdout
    assert 'doctor' in script and '--help-notebook' in script
    if shutil.which(shell):
        (tmp_path/'completion').write_text(script)
        assert subprocess.run([shell, '-n', tmp_path/'completion']).returncode == 0
