"""What the agent costs on a device, from an empty environment: size, import, idle memory, processor time a poll. `python benchmarks/agent.py` (needs a package registry; minutes)."""
import json, os, statistics, subprocess, sys, tempfile, textwrap, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
POLLS = '''
import datetime, http.server, json, os, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
here = Path(sys.argv[1])
from tinyfleet import Plant, Word, prove_word, tiny_bundle
from edgenb.agent.service import Agent, enrol
plant = Plant(here/'repo', datetime.datetime.now(datetime.timezone.utc))
v = [tiny_bundle(here/f'v{i}', f'v{i}', weights=os.urandom(2_000_000)) for i in range(7)]
for i in range(7): plant.release(here/f'v{i}', i + 1)
(here/'root.json').write_bytes(plant.root)
pid = os.fork()                                  # the server's processor time is not the agent's
if pid == 0:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *a): pass
    os.chdir(plant.path)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Quiet)
    (here/'port').write_text(str(server.server_address[1]))
    server.serve_forever()
while not (here/'port').exists() or not (here/'port').read_text(): time.sleep(0.02)
enrol(here/'device', here/'root.json', f"http://127.0.0.1:{(here/'port').read_text()}", 'plant-3', 'orin', trial_s=0, reserve_mb=0)
agent = Agent(here/'device', load=Word, prove=prove_word)
def cost(do):
    t = time.process_time(); do(); return (time.process_time() - t)*1e3
def settle():
    agent.machine.failures = 0
    for _ in range(60):
        agent.machine.asked = agent.machine.state == 'IDLE' and agent.machine.server.digest != want
        agent.machine.step()
        if agent.machine.state == 'IDLE' and agent.machine.server.digest == want and not agent.machine.journal.trial: return
    raise SystemExit(agent.machine.why)
changes, same = [], []
for i, want in enumerate(v):
    plant.campaign(want, v[i - 1] if i else None, state='complete', id=f'c{i}')
    changes.append(cost(settle))
    same += [cost(agent.poll) for _ in range(10)]
rss = int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e6
os.kill(pid, 9)
print(json.dumps({'change': changes[1:], 'same': same, 'rss_mb': rss}))
'''


def clean(): return {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
def out(*args, **kw): return subprocess.run([*map(str, args)], check=True, capture_output=True, text=True, env=clean(), **kw).stdout


def main():
    with tempfile.TemporaryDirectory() as folder:
        here, python = Path(folder), Path(folder)/'venv/bin/python'
        out(sys.executable, '-m', 'venv', here/'venv')
        site = Path(out(python, '-c', 'import site; print(site.getsitepackages()[0])').strip())
        size = lambda: int(out('du', '-sk', site).split()[0])/1000
        empty, t = size(), time.perf_counter()
        out(python, '-m', 'pip', '--disable-pip-version-check', '-q', 'install', '-c', ROOT/'constraints.txt', ROOT)
        packages = len(out(python, '-m', 'pip', '--disable-pip-version-check', 'list', '--format=freeze').split()) - 2
        print(f'installed from an empty environment in {time.perf_counter() - t:.0f} s (wall, this machine): {packages} packages, {size() - empty:.0f} MB beside pip itself; edgenb is {int(out("du", "-sk", site/"edgenb").split()[0])/1000:.1f} MB of it')
        for p, mb in sorted(((p.name, int(out('du', '-sk', p).split()[0])/1000) for p in site.iterdir() if p.is_dir()), key=lambda x: -x[1])[:7]: print(f'    {p:<24} {mb:6.1f} MB')
        def timed(code, n=9):
            seconds = []
            for _ in range(n):
                t0 = os.times(); subprocess.run([python, '-I', '-c', code], check=True, env=clean()); t1 = os.times()
                seconds.append(t1.children_user + t1.children_system - t0.children_user - t0.children_system)
            return statistics.median(seconds)
        bare = timed('pass')
        for code in ('import edgenb', 'import edgenb.agent.service'): print(f'`{code}`: {1e3*(timed(code) - bare):.0f} ms of processor time more than bare Python ({1e3*bare:.0f} ms), median of 9')
        print('`import edgenb.agent.service`:', out(python, '-I', '-c', 'import edgenb.agent.service, sys; print(len(sys.modules), "modules, torch is", "there" if "torch" in sys.modules else "not there")').strip())
        (here/'polls.py').write_text(POLLS)
        told = json.loads(out(python, here/'polls.py', here/'work', ROOT/'tests', cwd=here).splitlines()[-1])
        print(f"a poll over HTTP that finds nothing new: {statistics.median(told['same']):.1f} ms of processor time (median of {len(told['same'])}); at 900 s between polls {statistics.median(told['same'])/9000:.4f} % of a core")
        print(f"a poll that finds a release of 2 MB, fetches, checks, switches and commits it: {statistics.median(told['change']):.0f} ms (median of {len(told['change'])}; the model is a word and its health check costs nothing here: synthetic)")
        root = here/'idle'
        out(python, '-c', textwrap.dedent(f'''
            from edgenb.agent.service import enrol
            enrol({str(root)!r}, {str(here/"work/root.json")!r}, {str(here/"work/repo")!r}, 'plant-3', 'orin')'''))
        p = subprocess.Popen([here/'venv/bin/edgenb', 'agent', 'run', '--root', root, '--port', '0'], stdout=subprocess.PIPE, text=True, env=clean())
        p.stdout.readline(); time.sleep(5)
        read = lambda name: next(int(l.split()[1])/1000 for l in Path(f'/proc/{p.pid}/smaps_rollup').read_text().splitlines() if l.startswith(name))
        ticks = lambda: sum(map(int, Path(f'/proc/{p.pid}/stat').read_text().rsplit(')', 1)[1].split()[11:13]))/os.sysconf('SC_CLK_TCK')
        before = ticks(); time.sleep(20)
        print(f"idle, no model loaded: {read('Rss:'):.0f} MB resident, {read('Private_Dirty:'):.0f} MB of it its own; {ticks() - before:.2f} s of processor time in 20 s")
        p.terminate(); p.wait(20)


if __name__ == '__main__': main()
