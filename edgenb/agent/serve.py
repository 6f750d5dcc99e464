"""Decisions on the device: one warm model, in this process or over HTTP on the loopback, exchanged between two requests. Written by hand, not exported."""
import base64, gc, io, json, math, os, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np
from edgenb.core import EdgenbError

BODY_MAX = 32 << 20      # bytes of a request
INPUTS_MAX = 64          # of a request: made for one at a time
QUEUE = 16               # requests that may wait
PATIENCE_S = 30.0        # that a request waits for its turn, and a client may take to send its body
CONNECTIONS = 64
LOOPBACK = ('127.0.0.1', 'localhost', '[::1]')


class Busy(EdgenbError):
    "Too many requests wait already."


class NoModel(EdgenbError):
    "Nothing is installed that could decide."


def available_mb() -> float:
    "Memory that could be had without swapping; infinite where the system does not say."
    try: return next(int(l.split()[1])/1000 for l in Path('/proc/meminfo').read_text().splitlines() if l.startswith('MemAvailable'))
    except (OSError, StopIteration, ValueError): return math.inf


class _Loaded:
    def __init__(self, folder, digest, model): self.folder, self.digest, self.model, self.users, self.turn = folder, digest, model, 0, threading.Lock()


class Server:
    "Serves one model; another one takes over between two requests."
    def __init__(self, load=None,            # folder -> object with `predict(list) -> list` (default: `edgenb.ship.load_bundle`)
                 observe=lambda name, value, model=None: None,   # (name of edgenb.fleet.schema, number, digest of the bundle that it is about)
                 available=available_mb):
        self.load, self.observe, self.available = load or _load_bundle, observe, available
        self._now, self._gate, self._waiting, self._closed = None, threading.Condition(), 0, False
        self.how, self.why_nothing, self.known = '', 'no model is installed yet', set()
        self.fresh()

    @property
    def slot(self) -> str: return self._now.folder.name if self._now else ''
    @property
    def digest(self) -> str: return self._now.digest if self._now else ''

    # -- exchange
    def serve(self, folder: Path, digest: str, need_mb: float = 0):
        "Load a bundle and let it take over: beside the old one where memory allows, else after it. An error leaves the old one in place."
        folder, old = Path(folder), self._now
        need = need_mb or 2*sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())/1e6
        if old is None or self.available() > 1.2*need:
            new = _Loaded(folder, digest, self.load(folder))
            with self._gate: self._now = new
            self.how = 'the new model was loaded beside the old one, then took over (blue-green)' if old else ''
        else: self._stop_start(folder, digest, old, need)

    def _stop_start(self, folder, digest, old, need):
        "Too little memory for two: requests wait while one leaves and the other comes."
        with self._gate: self._closed = True
        try:
            if not self._drain(old): raise Busy(f'a request has used the model for {PATIENCE_S:g} s: it is not exchanged now')   # not taken away from under a request
            with self._gate: self._now = None
            old.model = None
            gc.collect()
            try: new = _Loaded(folder, digest, self.load(folder))
            except BaseException:
                with self._gate: self._now = _Loaded(old.folder, old.digest, self.load(old.folder))
                raise
            with self._gate: self._now = new
            self.how = f'there was no memory for two models ({need:.0f} MB more were needed): the old one left first, requests waited (stop-start)'
        finally:
            with self._gate: self._closed = False; self._gate.notify_all()

    def _drain(self, old, seconds=PATIENCE_S) -> bool:
        "Wait until nobody uses a model any more."
        with self._gate: return self._gate.wait_for(lambda: old.users == 0, seconds)

    def drop(self, why: str = 'the last model was given up and there is no other'):
        "Serve nothing."
        with self._gate: self._now = None
        self.why_nothing = why

    @contextmanager
    def _turn(self):
        "The model, for one request; it stays whole until the request is answered."
        with self._gate:
            if self._waiting >= QUEUE: raise Busy(f'{QUEUE} requests wait already: try again in a moment')
            self._waiting += 1
            try: ready = self._gate.wait_for(lambda: not self._closed, PATIENCE_S)
            except BaseException: self._waiting -= 1; raise
            now = self._now
            if not ready or now is None: self._waiting -= 1; raise Busy('the model is being exchanged: try again in a moment') if not ready else NoModel(f'there is no model to decide with: {self.why_nothing}')
            now.users += 1
        try:
            if not now.turn.acquire(timeout=PATIENCE_S): raise Busy('the model is busy: try again in a moment')
            try: yield now
            finally: now.turn.release()
        finally:
            with self._gate: now.users -= 1; self._waiting -= 1; self._gate.notify_all()

    # -- decisions
    def predict(self, inputs: list) -> list:   # of {'decision', 'label', 'score', ...}
        "Decide on inputs (bytes of images, windows or notes; arrays): as the bundle's `predict`, one at a time."
        return self.decide(inputs)[0]

    def decide(self, inputs: list):   # (answers, digest of the bundle that gave them)
        "Decide, and say who did."
        answers = []
        with self._turn() as now:
            watched = hasattr(now.model, 'detector')     # a bundle
            for x in inputs:
                start = time.perf_counter()
                try:
                    whole = now.model.answer([x]) if watched else {}
                    answer, = now.model.told(whole) if watched else now.model.predict([x])
                    if not math.isfinite(float(answer.get('score', 0))): raise ValueError('the score is not a number')
                except EdgenbError: raise            # the input's fault
                except Exception as e:               # the model's
                    self.observe('edgenb.decision.error.count', 1, now.digest); self.observe('edgenb.decision.count', 1, now.digest)   # the part first: telemetry holds it until its whole is there
                    self._seen(False)
                    raise Failed(f'the model failed on this input ({type(e).__name__}: {str(e)[:200]})') from None
                self._seen(True)
                self.observe('edgenb.decision.count', 1, now.digest)
                self.observe('edgenb.decision.duration', (time.perf_counter() - start)*1e3, now.digest)
                if 'score' in answer: self.observe('edgenb.decision.confidence', max(float(answer['score']), 1 - float(answer['score'])), now.digest)
                if watched and now.model.detector is not None: self._drift(now, whole['embedding'])
                answers.append(answer)
            self.known.add(now.digest)
        return answers, now.digest

    def _drift(self, now, embedding):
        "Hold an embedding against the reference in the bundle; a decision does not fail for it."
        from edgenb.drift import fourier
        detector = now.model.detector
        try: seen = detector.update(embedding)
        except EdgenbError: return
        if not seen.rows: return
        self.observe('edgenb.drift.sums', fourier(np.asarray(embedding, np.float64), detector.directions), now.digest)
        for alarm in seen.alarms: self.observe('edgenb.drift.alarm.count', 1, now.digest); self.observe('edgenb.drift.statistic', alarm.value*1e6, now.digest)

    def outcome(self, correct: bool, model: str):   # digest of the bundle that decided, as `decide` returned it
        "Somebody has said whether a decision was right: what a rollout is judged by."
        if model not in self.known: raise EdgenbError(f'{model[:12] or "no model"} has decided nothing here: send the "model" that came with the answer')
        if not correct: self.observe('edgenb.outcome.error.count', 1, model)
        self.observe('edgenb.outcome.count', 1, model)

    # -- the watch during a trial
    def fresh(self):
        "Count anew."
        self.seen = self.failed = self.in_a_row = 0

    def _seen(self, ok):
        self.seen += 1
        self.failed += not ok
        self.in_a_row = 0 if ok else self.in_a_row + 1

    def trouble(self) -> str:
        "What speaks against the model that serves; '' if nothing does."
        if self.in_a_row >= 3: return f'it failed {self.in_a_row} times in a row'
        if self.seen >= 20 and self.failed > 0.05*self.seen: return f'it failed on {self.failed} of {self.seen} inputs'
        return ''


class Failed(EdgenbError):
    "The model raised an error."


def _load_bundle(folder):
    from edgenb.ship import load_bundle
    return load_bundle(folder)


# -- HTTP
def inputs_of(body: bytes, kind: str) -> list:
    "The inputs in a request: raw bytes are one input; JSON has a list. Text is never taken for a path."
    if kind == 'application/json':
        try: asked = json.loads(body)['inputs']
        except (ValueError, KeyError, TypeError, RecursionError): raise EdgenbError('the body is not JSON with a list "inputs"') from None
        if not isinstance(asked, list) or not 0 < len(asked) <= INPUTS_MAX: raise EdgenbError(f'"inputs" must be a list of 1 to {INPUTS_MAX}')
        return [_input(x) for x in asked]
    if not body: raise EdgenbError('the body is empty: send an image, a window (.npy) or a note, or JSON')
    return [body]


def _input(x):
    if isinstance(x, dict) and isinstance(x.get('text'), str): return x['text'].encode()
    if isinstance(x, dict) and isinstance(x.get('base64'), str):
        try: return base64.b64decode(x['base64'], validate=True)
        except ValueError: raise EdgenbError('an input is not base64') from None
    if isinstance(x, dict) and isinstance(x.get('values'), list):
        out = io.BytesIO()
        try: np.save(out, np.array([[math.nan if v is None else v for v in row] for row in x['values']], np.float32), allow_pickle=False)
        except (ValueError, TypeError): raise EdgenbError('"values" must be rows of numbers, all of one length (null where nothing was measured)') from None
        return out.getvalue()
    raise EdgenbError('an input is {"base64": …} (an image, an .npy file), {"text": …} or {"values": [[…], …]}')


def outcome_of(body: bytes) -> tuple:   # (correct, digest of the bundle that decided)
    "What a program says of a decision."
    try: said = json.loads(body)
    except (ValueError, RecursionError): said = None
    if not isinstance(said, dict) or set(said) != {'model', 'correct'} or not isinstance(said['model'], str) or not isinstance(said['correct'], bool):
        raise EdgenbError('the body must be {"model": the one that came with the answer, "correct": true or false}')
    return said['correct'], said['model']


def http_server(server: Server, port: int, status=lambda: {}) -> ThreadingHTTPServer:
    "An HTTP server on the loopback, in threads of its own once `serve_forever` runs."
    slots = threading.BoundedSemaphore(CONNECTIONS)

    class Handler(BaseHTTPRequestHandler):
        timeout, server_version, sys_version, protocol_version = PATIENCE_S, 'edgenb', '', 'HTTP/1.1'
        disable_nagle_algorithm = True

        def log_message(self, *a): pass

        def say(self, code, value, **headers):
            data = (json.dumps(value, ensure_ascii=False) + '\n').encode()
            self.send_response(code)
            for k, v in {'Content-Type': 'application/json', 'Content-Length': len(data), 'Cache-Control': 'no-store', **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
            if code >= 400: self.close_connection = True; self.send_header('Connection', 'close')
            self.end_headers()
            self.wfile.write(data)

        def ours(self) -> bool:
            "Not a web page that somebody on the device has open: it would name another host or its origin."
            host = self.headers.get('Host', '').rsplit(':', 1)[0] if not self.headers.get('Host', '').endswith(']') else self.headers['Host']
            if host in LOOPBACK and 'Origin' not in self.headers: return True
            self.say(403, {'error': 'only programs on this device are answered'})
            return False

        def do_GET(self):
            if not self.ours(): return
            if self.path == '/healthz': self.say(*((200, {'ok': True, 'model': server.digest}) if server.digest else (503, {'ok': False, 'error': server.why_nothing})))
            elif self.path == '/v1/model': self.say(200, status())
            elif self.path in ('/v1/predict', '/v1/outcome'): self.say(405, {'error': f'{self.path} takes a POST: send one'}, Allow='POST')
            else: self.say(404, {'error': f'there is /healthz, /v1/model, /v1/predict and /v1/outcome, not {self.path[:100]}'})

        def do_POST(self):
            if not self.ours(): return
            if self.path in ('/healthz', '/v1/model'): return self.say(405, {'error': f'{self.path} takes a GET: send one'}, Allow='GET')
            if self.path not in ('/v1/predict', '/v1/outcome'): return self.say(404, {'error': f'there is /v1/predict and /v1/outcome, not {self.path[:100]}'})
            length = self.headers.get('Content-Length', '')
            if not length.isdigit() or 'Transfer-Encoding' in self.headers: return self.say(411, {'error': 'say Content-Length'})
            if int(length) > BODY_MAX: return self.say(413, {'error': f'at most {BODY_MAX} bytes'})
            try: body = self.rfile.read(int(length))
            except OSError: self.close_connection = True; return
            if len(body) < int(length): self.close_connection = True; return
            kind = self.headers.get_content_type() if self.headers.get('Content-Type') else ''
            if self.path == '/v1/outcome':
                try: server.outcome(*outcome_of(body)); return self.say(200, {'ok': True})
                except EdgenbError as e: return self.say(400, {'error': str(e)})
            try: answers, digest = server.decide(inputs_of(body, kind))
            except Busy as e: return self.say(503, {'error': str(e)}, Retry_After=1)
            except NoModel as e: return self.say(503, {'error': str(e)}, Retry_After=60)
            except Failed as e: return self.say(500, {'error': str(e)})
            except EdgenbError as e: return self.say(400, {'error': str(e)})
            self.say(200, {'model': digest, 'answers': answers})

    class Loopback(ThreadingHTTPServer):
        daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

        def process_request(self, request, address):
            if slots.acquire(blocking=False): super().process_request(request, address)
            else: self.shutdown_request(request)

        def process_request_thread(self, request, address):
            try: super().process_request_thread(request, address)
            finally: slots.release()

        def handle_error(self, request, address): pass   # a client that went away

    try: return Loopback(('127.0.0.1', port), Handler)
    except OSError as e: raise EdgenbError(f'port {port} on 127.0.0.1 cannot be used ({e.strerror}): another program listens there, or choose another `port` in device.json') from None
