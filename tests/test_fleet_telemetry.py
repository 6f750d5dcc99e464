"""Nothing but the table's rounded whole numbers gets from a device into the collector, whoever controls the device.

An attempt *arrives* if its payload can be had back from what is stored, beyond what `capacity` says that a row can carry. The attacker has the device's key, speaks the protocol, and chooses every byte."""
import base64, gzip, hashlib, http.client, itertools, json, threading
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from edgenb.core import EdgenbError
from edgenb.fleet.collector import accept, collector_key, enrol, import_folder, server, store, take
from edgenb.fleet.envelope import ROWS, new_key, public_of, seal, sealed_rows, signer_of
from edgenb.fleet.outbox import Outbox, batch
from edgenb.fleet.schema import BUDGET, LONGEST, METRICS, REASONS, SAVED, Refused, bits, capacity, check_row, compact, decode, encode, on_grid, quantised, values

NOW, MODEL = 29_800_800, 'ab'*32
SECRETS = ['Mrs Smith, born 1984-05-02', 'MRN 00482913', 'Patientin Müller, Zimmer 12', 'serial AX-99-1207', 'рatient', '患者 三', 'eyJuYW1lIjoiU21pdGgifQ==', "'; DROP TABLE rows; --"]

class Fleet:
    "A collector with one device whose key the attacker has."
    def __init__(self, folder):
        self.folder, self.db = folder, folder/'fleet.db'
        self.device = enrol(self.db, new_key(folder/'device.key'), 'plant-1', 'orin', minute=NOW)['id']
        self.signer, self.seq, self.attempts, self.said = signer_of(folder/'device.key'), 0, 0, []
        accept(self.db, MODEL, minute=NOW)

    def row(self, **kw):
        self.seq += 1
        return {'device': self.device, 'boot': 0, 'seq': self.seq, 'at': NOW, 'model': MODEL, 'metrics': {'edgenb.decision.count': 5}} | kw

    def stored(self):
        with store(self.db) as db: return db.execute('SELECT d.device, r.boot, r.seq, r.at, m.digest, r.metrics FROM rows r JOIN devices d ON d.id = r.device LEFT JOIN models m ON m.id = r.model ORDER BY r.id').fetchall()

    def attempt(self, data):
        "Give bytes to the collector; True if they were taken. What a refusal says must not repeat them."
        self.attempts += 1
        try: take(self.db, data, NOW, budget=10**9)
        except EdgenbError as e: self.said.append(str(e)); return False
        return True

    def rows(self, text, **outer):
        "Rows as raw JSON text, properly signed: the envelope is in order, what is in it need not be."
        from securesystemslib.dsse import Envelope
        e = Envelope(b'{"after":null,"device":"%s","edgenb_telemetry":1,"life":"00000000","rows":[%s]}' % (self.device.encode(), text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass')), ROWS, {})
        e.sign(self.signer)
        return compact(e.to_dict() | outer)

    def bytes(self): return b''.join(p.read_bytes() for p in self.folder.glob('fleet.db*') if p.suffix != '.key')

def disguises(secret):
    "Ways in which a text may be found again."
    raw = secret.encode()
    yield from (raw, raw[::-1], raw.hex().encode(), base64.b64encode(raw), base64.b32encode(raw), base64.urlsafe_b64encode(raw), secret.encode('utf-16-le'), json.dumps(secret).encode()[1:-1], str(int.from_bytes(raw, 'big')).encode(), hashlib.sha256(raw).hexdigest()[:16].encode())
    yield from (str(list(raw)).encode(), ','.join(map(str, raw)).encode(), ','.join(str(ord(c)) for c in secret).encode())

def nothing_arrived(fleet):
    "Every stored row is one that the schema can say; no disguise of a secret is in the database, or in what refusals said."
    for device, boot, seq, at, model, metrics in fleet.stored():
        row = {'device': device, 'boot': boot, 'seq': seq, 'at': at, 'model': model, 'metrics': json.loads(metrics)}
        assert compact(check_row(row)['metrics']).decode() == metrics
    for where in (fleet.bytes(), '\n'.join(fleet.said).encode()):
        for secret in SECRETS:
            for d in disguises(secret): assert d not in where, d
    return True

def numbers_of(secret):
    "A text as numbers, in the ways in which numbers can be written."
    n, raw = int.from_bytes(secret.encode(), 'big'), secret.encode()
    yield from (str(n), str(-n), f'{n}.0', f'0.{n}', f'1e{n % 300}', f'{n % 10**15}e-5', f'1.{n % 10**17}', '-0', '-0.0', '0e0', '1E2', '+5', '05', '0x41', '1_0', 'NaN', 'Infinity', '-Infinity', '５', '1 ', ' 1', '1\t', '\n1', '1/**/')
    yield from (json.dumps(secret), json.dumps(secret, ensure_ascii=False), json.dumps(base64.b64encode(raw).decode()), json.dumps(raw.hex()), json.dumps(list(raw)), json.dumps({secret: 1}), json.dumps({'value': secret}), json.dumps([secret]), json.dumps([[secret]*3]), 'true', 'false', 'null', '[]', '{}')

def test_no_text_arrives_in_the_place_of_any_number(tmp_path):
    fleet = Fleet(tmp_path)
    base, taken = compact(fleet.row()).decode(), 0
    names = [*METRICS, 'edgenb.note', *SECRETS]
    for secret in SECRETS[:3]:
        for form in numbers_of(secret):
            for field in ('at', 'boot', 'seq', 'device', 'model', 'metrics'):
                row = fleet.row(); text = compact(row).decode().replace(f'"{field}":{compact(row[field]).decode()}', f'"{field}":{form}')
                taken += fleet.attempt(fleet.rows(text))
    for form, name in zip(itertools.cycle(numbers_of(SECRETS[0])), names*20): taken += fleet.attempt(fleet.rows(base.replace('"edgenb.decision.count":5', f'{json.dumps(name)}:{form}')))
    assert fleet.attempts >= 1000 and nothing_arrived(fleet)
    assert taken == len(fleet.stored()) <= 40          # `null` as the model, {} as metrics: rows that the schema has
    print(f'{fleet.attempts} attempts')

def test_no_text_arrives_beside_the_fields(tmp_path):
    fleet = Fleet(tmp_path)
    for secret in SECRETS:
        s, plain, raw = json.dumps(secret), compact(fleet.row()).decode(), json.dumps(secret, ensure_ascii=False)
        texts = [plain[:-1] + f',{s}:1}}', plain[:-1] + f',"note":{s}}}', '{' + f'"at":{s},' + plain[1:], plain.replace('"seq":', f'"seq":{s},"seq":'), plain.replace('{"edgenb', f'{{{s}:1,"edgenb'), plain.replace('.count":5', f'.count":5,"edgenb.decision.count":{s}'),
                 plain + s, plain + ',' + s, s + ',' + plain, plain + f'/*{secret}*/', plain + ' '*ord(secret[0]), plain.replace(':', ': ' if len(secret) % 2 else ' :'), '\ufeff' + plain, plain.replace('"seq"', '"\\u0073eq"'), plain.replace('5', '５'), plain.replace('"boot"', '"bооt"'),
                 plain.replace('abab', 'аbab'), plain.replace('ab'*32, 'AB'*32), plain.replace('ab'*32, base64.b64encode(secret.encode().ljust(48, b'.')[:48]).decode()), plain.replace(fleet.device, secret.encode().hex().ljust(32, '0')[:32]), plain.replace('"metrics":{', f'"metrics":{{"edgenb.{secret}":1,'),
                 plain.replace('"edgenb.decision.count":5', f'"edgenb.decision.confidence":[{",".join(str(b) for b in secret.encode())}]'), plain.replace('"edgenb.decision.count":5', '"edgenb.decision.confidence":[30' + ',0'*9 + f',{raw}]'), plain.replace('}', '}'*2), '['*3000, '{"a":'*3000, plain.replace('}}', f'}},"seq":{raw}}}')]
        # the order of names as a message
        pairs = list(fleet.row().items()); order = hashlib.sha256(secret.encode()).digest()
        texts += [json.dumps(dict(sorted(pairs, key=lambda p: (order[i] ^ ord(p[0][0]), p[0]))), separators=(',', ':')) for i in range(8)]
        for text in texts: fleet.attempt(fleet.rows(text))
        for outer in ({'payloadType': secret}, {'payloadType': ROWS, 'note': secret}, {'signatures': [{'keyid': secret, 'sig': ''}]}, {'payload': s}): fleet.attempt(fleet.rows(plain, **outer))
        for value in ({'edgenb_telemetry': 1, 'after': None, 'device': fleet.device, 'life': '0'*8, 'rows': [], 'note': secret}, {'edgenb_telemetry': secret, 'after': None, 'device': fleet.device, 'life': '0'*8, 'rows': []}, {'edgenb_telemetry': 1, 'after': None, 'device': secret, 'life': '0'*8, 'rows': []}, {'edgenb_telemetry': 1, 'after': None, 'device': fleet.device, 'life': '0'*8, 'rows': secret}, {'edgenb_telemetry': 1, 'after': None, 'device': fleet.device, 'life': '0'*8, 'rows': [secret]},
                      {'edgenb_telemetry': 1, 'after': None, 'device': fleet.device, 'life': secret, 'rows': []}, {'edgenb_telemetry': True, 'after': None, 'device': fleet.device, 'life': '0'*8, 'rows': []}, {'edgenb_telemetry': 1, 'after': secret, 'device': fleet.device, 'life': '0'*8, 'rows': []}, {'edgenb_telemetry': 1, 'after': [secret, 1], 'device': fleet.device, 'life': '0'*8, 'rows': []}, {'edgenb_telemetry': 1, 'after': [2**70, 1], 'device': fleet.device, 'life': '0'*8, 'rows': []}, [secret], secret, None, 7): fleet.attempt(seal(value, ROWS, fleet.signer))
        for data in (secret.encode(), gzip.compress(secret.encode()*1000), gzip.compress(b'\0'*10**7), b'', b'\0'*100, base64.b64encode(plain.encode())): fleet.attempt(data)
    assert fleet.attempts > 300 and nothing_arrived(fleet)
    with store(fleet.db) as db: assert {r for r, in db.execute('SELECT reason FROM refused')} <= {'size', 'json', 'form', 'field', 'metric', 'value', 'few', 'device', 'signature', 'model', 'version', 'gap'}   # refusals are counted by words from a list

def test_a_row_that_is_in_order_is_taken(tmp_path):
    fleet = Fleet(tmp_path)      # or the tests above would show nothing
    assert fleet.attempt(fleet.rows(compact(fleet.row()))) and len(fleet.stored()) == 1

junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(list(METRICS)) | st.text(max_size=12), inner, max_size=4), max_leaves=12)

@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(junk, st.sampled_from(['at', 'boot', 'device', 'metrics', 'model', 'seq', 'more']))
def test_whatever_is_decoded_is_a_row_of_the_schema(value, field):
    row = {'device': '5f'*16, 'boot': 0, 'seq': 1, 'at': NOW, 'model': MODEL, 'metrics': {'edgenb.decision.count': 5}} | {field: value}
    try: data = json.dumps(row, sort_keys=True, separators=(',', ':')).encode()
    except (ValueError, TypeError): return
    try: decoded = decode(data)
    except Refused: return
    assert encode(decoded) == data and check_row(decoded) == decoded and all(on_grid(METRICS[n], x) for n, v in decoded['metrics'].items() for x in (v if isinstance(v, list) else [v]))

metric = st.sampled_from([m for m in METRICS.values() if m.name not in ('edgenb.drift.sums', 'edgenb.drift.rows', 'edgenb.outcome.error.count', 'edgenb.decision.error.count')])

@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(metric, st.integers(-2**50, 2**50)), max_size=12, unique_by=lambda p: p[0].name), st.integers(0, 2**20 - 1), st.none() | st.just(MODEL))
def test_every_row_that_can_be_written_is_read_back_the_same(pairs, seq, model):
    metrics = {m.name: quantised(m, v) if not m.size else [quantised(m, abs(v) + 20)]*m.size for m, v in pairs}
    row = {'device': '5f'*16, 'boot': 3, 'seq': seq, 'at': NOW, 'model': model, 'metrics': metrics}
    assert decode(encode(row)) == row and encode(decode(encode(row))) == encode(row) and len(encode(row)) <= LONGEST

@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_make_the_decoder_fail_otherwise_than_by_refusing(data):
    try: decode(data)
    except Refused as e: assert str(e) in {str(Refused(r)) for r in REASONS}   # fixed words: nothing of what was sent

@pytest.mark.parametrize('name', METRICS)
def test_a_metric_has_no_more_values_than_are_counted(name):
    m = METRICS[name]
    grid = {quantised(m, v*m.step) for v in range(m.low//m.step, min(m.high//m.step, 2**16) + 1)} | {m.high}
    accepted = {v for g in grid for v in (g - m.step, g - 1, g, g + 1, g + m.step) if on_grid(m, v)}
    assert len(accepted) <= values(m) and all(quantised(m, v) == v for v in accepted)
    if m.step == 1 and m.high <= 2**16: assert {v for v in range(m.low - 2, m.high + 3) if on_grid(m, v)} == accepted and len(accepted) == values(m)

def test_a_device_that_says_all_it_can_stays_within_the_budget(tmp_path):
    fleet = Fleet(tmp_path)
    metrics = {n: m.high if not m.size else [m.high]*m.size for n, m in METRICS.items()}
    said = 0.0
    for day in range(0, 12, 3):
        for _ in range(12):
            rows = [fleet.row(at=NOW + 1440*day, metrics=metrics) for _ in range(100)]
            before = len(fleet.stored())
            take(fleet.db, sealed_rows(fleet.device, '0'*8, rows, fleet.signer), NOW + 1440*day)
            said += (len(fleet.stored()) - before)*capacity(rows[0], 1)/8
            if len(fleet.stored()) - before < 100: break
    assert SAVED*BUDGET*0.9 < said <= (SAVED + 9)*BUDGET          # what was saved up, and nine days

def test_one_device_cannot_write_as_another(tmp_path):
    fleet = Fleet(tmp_path)
    other = enrol(fleet.db, new_key(tmp_path/'other.key'), 'plant-1', 'orin', minute=NOW)['id']
    row = fleet.row(device=other)
    assert not fleet.attempt(seal({'edgenb_telemetry': 1, 'after': None, 'device': other, 'life': '0'*8, 'rows': [row]}, ROWS, fleet.signer)) and not fleet.attempt(seal({'edgenb_telemetry': 1, 'after': None, 'device': fleet.device, 'life': '0'*8, 'rows': [row]}, ROWS, fleet.signer))
    assert fleet.stored() == []

def test_times_out_of_range_are_replaced_by_the_time_of_arrival(tmp_path):
    fleet = Fleet(tmp_path)
    for at in (NOW + 1445, NOW - 401*1440): assert fleet.attempt(fleet.rows(compact(fleet.row(at=at // 5 * 5))))
    for at in (0, -5, NOW + 1, 2**40 // 5 * 5, 68_374_080): assert not fleet.attempt(fleet.rows(compact(fleet.row(at=at))))
    assert [r[3] for r in fleet.stored()] == [NOW, NOW]

def test_boot_and_seq_only_grow(tmp_path):
    fleet = Fleet(tmp_path)
    assert fleet.attempt(fleet.rows(compact(fleet.row(boot=2, seq=7))))
    for boot, seq in ((2, 7), (2, 3), (1, 9), (0, 2**20 - 1)): fleet.attempt(fleet.rows(compact(fleet.row(boot=boot, seq=seq, metrics={'edgenb.decision.count': 77}))))
    for boot, seq in ((2**20, 0), (3, 2**20), (3, -1), (2**70, 1)): assert not fleet.attempt(fleet.rows(compact(fleet.row(boot=boot, seq=seq))))
    assert len(fleet.stored()) == 1

def test_the_telemetry_of_a_device_refuses_what_is_no_number_and_says_how_often(tmp_path):
    fleet = Fleet(tmp_path)
    box = Outbox(tmp_path/'outbox.db', fleet.device, tmp_path/'device.key', public_of(collector_key(fleet.db)))
    for secret in SECRETS:
        for name in METRICS: box.observe(name, secret)
        with pytest.raises(EdgenbError): box.observe(secret, 1)
    row = box.close(NOW)
    assert set(row['metrics']) == {'edgenb.process.restart.count', 'edgenb.interval.duration', 'edgenb.telemetry.queue', 'edgenb.telemetry.refused.count'}
    assert row['metrics']['edgenb.telemetry.refused.count'] == quantised(METRICS['edgenb.telemetry.refused.count'], len(SECRETS)*len(METRICS))
    assert fleet.attempt(batch(box)[0]) and nothing_arrived(fleet)

def test_http_takes_no_text_by_any_other_door(tmp_path, capfd):
    fleet = Fleet(tmp_path)
    s = server(fleet.db); threading.Thread(target=s.serve_forever, daemon=True).start()
    def ask(method, to, headers, body=b''):
        c = http.client.HTTPConnection(*s.server_address, timeout=20)
        try:
            c.putrequest(method, to, skip_host=True, skip_accept_encoding=True)
            for k, v in headers.items(): c.putheader(k, v)
            c.endheaders()
            try: c.send(body)
            except OSError: pass
            r = c.getresponse(); return r.status, r.read()
        except (http.client.HTTPException, OSError): return 0, b''
        finally: c.close()
    good, plain = fleet.rows(compact(fleet.row())), [x for x in SECRETS if x.isascii()]
    answers = []
    for secret in plain:
        quoted = secret.replace(' ', '%20')
        answers += [ask('POST', f'/v1/rows?{quoted}', {'Content-Length': str(len(good))}, good), ask('GET', '/' + quoted, {}), ask('POST', '/v1/' + quoted, {'Content-Length': '0'}), ask('POST', '/v1/rows', {'Content-Length': secret}), ask('POST', '/v1/rows', {'Content-Length': '5', 'X-Note': secret}, secret.encode()[:5]),
                    ask('POST', '/v1/rows', {'Transfer-Encoding': 'chunked'}, b'%x\r\n%s\r\n' % (len(secret), secret.encode())), ask('POST', '/v1/rows', {'Content-Length': '30', 'Content-Encoding': 'gzip'}, gzip.compress(b'\0'*10**6)[:30]), ask('POST', '/v1/rows', {'Content-Length': str(2**40)}), ask(secret.split()[0].upper()[:5], '/v1/rows', {}),
                    ask('POST', '/v1/rows', {'Content-Length': str(len(secret.encode()))}, secret.encode()), ask('POST', '/v1/rows', {'Content-Length': '4000'}, b'['*4000), ask('POST', '/v1/rows', {'Content-Length': '10', 'Cookie': secret*2000}, b'x'*10)]
    assert all(status != 200 for status, _ in answers) and fleet.stored() == []
    assert ask('POST', '/v1/rows', {'Content-Length': str(len(good)), 'User-Agent': SECRETS[0]}, good)[0] == 200 and len(fleet.stored()) == 1
    s.shutdown(); s.server_close()
    out, err = capfd.readouterr()
    for secret in plain: assert not any(secret.encode() in body for _, body in answers) and secret not in out + err
    assert nothing_arrived(fleet)

def test_names_of_files_on_a_stick_are_no_channel(tmp_path):
    fleet = Fleet(tmp_path); stick = tmp_path/'stick'; stick.mkdir()
    (stick/'Mrs Smith, born 1984-05-02.rows.json').write_bytes(fleet.rows(compact(fleet.row())))
    (stick/'MRN 00482913.rows.json').write_bytes(b'MRN 00482913')
    assert import_folder(fleet.db, stick, NOW) == {'files': 1, 'refused': {'json': 1}} and nothing_arrived(fleet)
    assert (stick/f'{fleet.device}.ack.json').is_file()

def test_a_day_of_ordinary_telemetry_needs_half_of_the_budget():
    hourly = {'metrics': {n: 0 for n, m in METRICS.items() if not n.startswith('edgenb.drift.sums')}}
    assert (24*capacity(hourly) + bits(METRICS['edgenb.drift.sums']))/8 < 0.6*BUDGET
