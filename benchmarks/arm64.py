"""The agent on arm64, emulated by qemu-user: installs the aarch64 wheels, takes three releases of a real ONNX network, refuses a wrong one, goes back. **Correctness only**: no time that was taken here means anything.

`python benchmarks/arm64.py FOLDER` on a Debian x86-64 machine, as root (for a mount namespace), with qemu-user-static and this project's workstation environment; keeps what it fetched in FOLDER.
onnxruntime's processor detection dies of an x86 /proc/cpuinfo, so that file is replaced in a private mount namespace; there is no binfmt_misc, so what the agent starts as `sys.executable` is a wrapper.
"""
import json, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEBS = 'libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3 libffi8 liblzma5 libbz2-1.0 libsqlite3-0 libuuid1 libcrypt1 libmpdec3 libgomp1 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib python3.11'
CPUINFO = 'processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n'
DEVICE = '''
import json, platform, sys
from pathlib import Path
sys.executable = sys.argv[1]
from edgenb.agent.service import enrol, load_device, poll, roll_back, status
from edgenb.core import EdgenbError
here = Path(sys.argv[2])
digests = json.loads((here/'digests.json').read_text())
def step(stick):
    try: said = poll(here/'device', here/stick)
    except EdgenbError as e: said = f'refused: {e}'
    return {'stick': stick, 'said': said, 'serves': status(here/'device')['serving']['digest']}
enrol(here/'device', here/'root.json', 'https://unreachable.invalid', 'plant-3', 'pi', reserve_mb=0)
seen = [step('one'), step('wrong'), step('two')]
seen.append({'stick': 'by hand', 'said': roll_back(here/'device'), 'serves': status(here/'device')['serving']['digest']})
from edgenb.ship import load_bundle
slot = status(here/'device')['serving']['slot']
print(json.dumps({'machine': platform.machine(), 'seen': seen, 'answer': load_bundle(here/'device/slots'/slot).predict([(here/'x.npy').read_bytes()])}))
'''


def sh(*args, **kw): return subprocess.run([*map(str, args)], check=True, capture_output=True, text=True, **kw).stdout


def sysroot(here: Path) -> Path:
    "An arm64 Python from Debian, unpacked, by an apt configuration of its own."
    root = here/'root'
    if (root/'usr/bin/python3.11').exists(): return root
    for p in ('apt/lists/partial', 'apt/cache/archives/partial', 'apt/dpkg', 'debs', 'root'): (here/p).mkdir(parents=True, exist_ok=True)
    (here/'apt/dpkg/status').touch()
    (here/'apt.conf').write_text(f'APT::Architecture "arm64"; APT::Architectures {{"arm64";}};\nDir::State "{here}/apt"; Dir::State::lists "{here}/apt/lists"; Dir::State::status "{here}/apt/dpkg/status"; Dir::Cache "{here}/apt/cache";\n')
    env = os.environ | {'APT_CONFIG': str(here/'apt.conf')}
    sh('apt-get', 'update', env=env)
    known = [d for d in DEBS.split() if sh('apt-cache', 'search', '--names-only', f'^{d.replace("+", "[+]")}$', env=env).strip()]
    sh('apt-get', 'download', *known, env=env, cwd=here/'debs')
    for deb in sorted((here/'debs').glob('*.deb')): sh('dpkg-deb', '-x', deb, root)
    for d in ('lib', 'bin'):                        # what a merged /usr expects
        if (root/d).is_dir() and not (root/d).is_symlink(): sh('cp', '-a', f'{root/d}/.', root/'usr'/d); sh('rm', '-r', root/d); (root/d).symlink_to(f'usr/{d}')
    return root


def main(folder):
    here = Path(folder).absolute()
    here.mkdir(parents=True, exist_ok=True)
    root, site = sysroot(here), here/'site'
    if not (site/'onnxruntime').exists():
        pins = [l for l in (ROOT/'constraints.txt').read_text().splitlines() if l.split('==')[0].lower() in ('numpy', 'pillow', 'tuf', 'securesystemslib', 'cryptography', 'cffi', 'zstandard', 'urllib3', 'onnxruntime', 'pycparser')]
        (here/'pins').write_text('\n'.join(pins))
        sh(sys.executable, '-m', 'pip', 'install', '-q', '--target', site, '--only-binary=:all:', '--python-version', '3.11', '--implementation', 'cp', '--abi', 'cp311', '--abi', 'abi3', '--abi', 'none', *sum((['--platform', f'manylinux_2_{v}_aarch64'] for v in (17, 26, 27, 28, 31, 34)), []), '--platform', 'manylinux2014_aarch64', '-c', here/'pins',
           'numpy', 'pillow', 'tuf', 'securesystemslib[crypto]', 'zstandard', 'onnxruntime')
    (here/'cpuinfo').write_text(CPUINFO)
    wrapper = here/'python'
    wrapper.write_text(f'#!/bin/sh\nexec env -u LD_LIBRARY_PATH PYTHONHOME={root}/usr PYTHONPATH={ROOT}:{site} OPENBLAS_NUM_THREADS=1 qemu-aarch64-static -cpu cortex-a72 -L {root} {root}/usr/bin/python3.11 "$@"\n'); wrapper.chmod(0o755)
    run = here/'run'
    if run.exists(): sh('rm', '-r', run)
    expected = publish(run)
    (run/'device.py').write_text(DEVICE)
    done = subprocess.run(['unshare', '-m', 'sh', '-c', f'mount --bind {here}/cpuinfo /proc/cpuinfo && exec {wrapper} {run}/device.py {wrapper} {run}'], capture_output=True, text=True, env={k: v for k, v in os.environ.items() if not k.startswith('PYTHON')})
    if done.returncode: sys.exit(f'{done.stdout[-1000:]}\n{done.stderr[-4000:]}')
    told = json.loads(done.stdout.splitlines()[-1])
    digests = json.loads((run/'digests.json').read_text())
    names = {d: n for n, d in digests.items()}
    print(f"{told['machine']} (emulated by qemu-user; correctness only)")
    for s in told['seen']: print(f"  {s['stick']:<8} serves {names[s['serves']]:<6} {s['said'].splitlines()[0][:150]}")
    print(f"  answer there {told['answer'][0]}, here {expected}")
    assert told['machine'] == 'aarch64' and [names[s['serves']] for s in told['seen']] == ['one', 'one', 'two', 'one'] and told['answer'][0]['decision'] == expected['decision'] and abs(told['answer'][0]['score'] - expected['score']) < 1e-5


def publish(run: Path) -> dict:
    "Three releases of a small network on sticks, made on this machine; the answer of the first here."
    sys.path.insert(0, str(ROOT/'tests'))
    import shutil
    import numpy as np
    from edgenb.fleet.keys import ceremony, unlock
    from edgenb.fleet.repository import create
    from edgenb.fleet.stick import export_usb
    from edgenb.ship import load_bundle
    from test_fleet_device import SECRET, campaign
    from test_golden import make_bundle, onnx_model, seal, window_pipeline
    run.mkdir()
    signers = unlock(run/'keys', passphrase=SECRET) if (ring := ceremony(run/'keys', SECRET)) else []
    repository, digests = create(run/'repository', ring, signers), {}
    for name, change in {'one': 0.0, 'wrong': 0.0, 'two': 0.01}.items():
        folder = make_bundle(run/f'bundle-{name}', window_pipeline(), seed=3, change=change)
        if name == 'wrong': onnx_model(folder/'model.onnx', (6, 32), 3, seed=8); seal(folder, artifact='wrong')
        repository.publish(folder, signers=signers)
        digests[name] = json.loads((folder/'manifest.json').read_text())['digest']
    for name in digests:
        repository.set_campaigns({'campaigns': [campaign(digests[name], digests['one'] if name != 'one' else None, id=name)]}, signers)
        export_usb(repository, run/name, valid_days=30, signers=signers)
    (run/'digests.json').write_text(json.dumps(digests))
    np.save(run/'x.npy', np.random.default_rng(5).normal(size=(3, 32)).astype(np.float32))
    shutil.copy(run/'repository/metadata/1.root.json', run/'root.json')
    return load_bundle(run/'bundle-one').predict([(run/'x.npy').read_bytes()])[0]


if __name__ == '__main__': main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
