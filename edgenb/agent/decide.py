"""What the signed campaigns ask of this device: pure functions, so that every answer can be explained and tested. Written by hand, not exported."""
import datetime, re
from dataclasses import dataclass, replace
import edgenb
from edgenb.core import EdgenbError
from edgenb.fleet.cohorts import takes_part
from edgenb.fleet.windows import days_of, minute_of, window_open
from .storage import Device, Journal

FORMAT = 1   # of campaigns.json and of a release
STATES = ('running', 'paused', 'rolled-back', 'aborted', 'complete')
HEX = re.compile(r'[0-9a-f]{64}')


@dataclass(frozen=True)
class Decision:
    "What to do, and why in words."
    release: str | None      # digest of the bundle that this device should run; None: leave it as it is
    why: str
    campaign: str = ''
    now: bool = True         # may it be switched on now, or only fetched
    windows: tuple = ()      # of the campaign
    agent: str = '0'         # oldest agent that the campaign takes
    name: str = ''           # of the model that the campaign is about
    named: bool = False      # its release is what this device serves


def version_tuple(text: str) -> tuple:
    "A version as numbers, so that 0.10 is newer than 0.9."
    return tuple(int(n) for n in re.findall(r'\d+', str(text))[:4])


def _sound(c) -> bool:
    "A campaign has the fields that a decision needs, of the kinds that it needs."
    return (isinstance(c, dict) and all(isinstance(c.get(k), str) for k in ('id', 'name', 'release', 'state', 'seed')) and bool(HEX.fullmatch(c['release']))
            and (c.get('replaces') is None or isinstance(c['replaces'], str) and bool(HEX.fullmatch(c['replaces']))) and isinstance(c.get('cutoffs'), dict)
            and all(isinstance(v, str) for v in c['cutoffs'].values()) and isinstance(c.get('windows', []), list)
            and isinstance(c.get('strata'), list) and all(s in ('site', 'hardware') for s in c['strata']))


def decide(document: dict,                # campaigns.json, verified
           device: Device, journal: Journal,
           at: datetime.datetime,         # the device's local time
           version: str = edgenb.__version__   # of this agent
          ) -> Decision:
    "What the campaigns ask of this device."
    def stay(why, campaign=''): return Decision(None, why, campaign)
    if not isinstance(document, dict) or document.get('edgenb_campaigns') != FORMAT or not isinstance(document.get('campaigns'), list):
        return stay(f'the campaigns are of a format that this agent ({version}) does not know: install a newer edgenb')
    mine = [c for c in document['campaigns'] if isinstance(c, dict) and (not device.model or c.get('name') == device.model)]
    names = sorted({str(c.get('name')) for c in mine})
    if not names: return stay(f"no campaign is about {device.model or 'any model'}")
    if len(names) > 1: return stay(f"the campaigns name several models ({', '.join(names)}): enrol this device with --model")
    c = mine[-1]   # a later campaign supersedes the earlier ones
    if not _sound(c): return stay(f"campaign {c.get('id', '?')} is damaged or of a format that this agent does not know")
    if c['state'] not in STATES: return stay(f"campaign {c['id']} is '{c['state']}', which this agent ({version}) does not know: install a newer edgenb", c['id'])
    if version_tuple(c.get('agent', '0')) > version_tuple(version): return stay(f"campaign {c['id']} needs agent {c['agent']}, this is {version}: install a newer edgenb", c['id'])
    d = _timed(_wanted(c, device, journal, {m['release'] for m in {m['release']: m for m in mine if _sound(m)}.values() if m['state'] == 'rolled-back'}), c, journal, at)
    held = journal.serving()
    return replace(d, name=c['name'], named=held is not None and held.digest == c['release'])


def given_up(journal: Journal, release: str, campaign: str) -> str:   # why; '' if it is not
    "Whether a release failed here too often to be tried again for this campaign."
    failed = journal.tries.get(release)
    return f"release {release[:12]}… failed here ({failed['reason']}): not tried again until another campaign names it" if failed and failed['quarantined'] and failed['campaign'] == campaign else ''


def _wanted(c: dict, device: Device, journal: Journal, withdrawn: set) -> Decision:   # withdrawn: releases whose last campaign was rolled back
    "Which release the campaign wants here."
    held, back, name = journal.serving(), c.get('replaces'), f"campaign {c['id']}"
    on_it = held is not None and held.digest == c['release']
    astray = held is None or held.digest in withdrawn   # a device that was away while a campaign before this one was rolled back
    known_good = Decision(back, f"{name} is {c['state']}; devices outside it run what it replaces", c['id']) if back else Decision(None, f"{name} is {c['state']} and names nothing to run meanwhile", c['id'])
    reason = f": {c['reason']}" if c.get('reason') else ''
    if c['state'] == 'rolled-back':
        if not on_it: return known_good if astray else Decision(None, f'{name} was rolled back{reason}; this device is not on it', c['id'])
        return Decision(back, f'{name} was rolled back{reason}', c['id']) if back else Decision(None, f'{name} was rolled back{reason}, but names nothing to go back to: the model stays', c['id'])
    if on_it: return Decision(None, f'{name} ({c["state"]}): this device runs its release', c['id'])
    if c['state'] in ('paused', 'aborted'): return known_good if astray else Decision(None, f"{name} is {c['state']}{reason}: nothing new is installed", c['id'])
    if c['state'] == 'complete': return Decision(c['release'], f'{name} is complete: every device runs its release', c['id'])
    stage = f"stage {c['stages'][c['stage']]} %" if isinstance(c.get('stages'), list) and isinstance(c.get('stage'), int) and 0 <= c['stage'] < len(c['stages']) else 'its stage'
    if takes_part(c, {'id': device.id, 'site': device.site, 'hardware': device.hardware}): return Decision(c['release'], f'{name}, {stage}: this device takes part ({device.stratum})', c['id'])
    if back and (held is None or held.digest != back): return known_good
    return Decision(None, f'{name}, {stage}: this device does not take part yet ({device.stratum})', c['id'])


def _timed(d: Decision, c: dict, journal: Journal, at: datetime.datetime) -> Decision:
    "Quarantine and maintenance windows. A device that serves nothing waits for no window."
    if d.release is None or (journal.serving() and journal.serving().digest == d.release): return Decision(None, d.why, d.campaign)
    if why := given_up(journal, d.release, d.campaign): return Decision(None, f'{d.why}, but {why}', d.campaign)
    try:
        for w in c.get('windows', []): days_of(w['days']), minute_of(w['from']), minute_of(w['to'])   # all of them: they are read again later
        now = journal.serving() is None or window_open(c.get('windows', []), at)
    except (EdgenbError, KeyError, TypeError, AttributeError) as e: return Decision(None, f'campaign {d.campaign}: its maintenance windows cannot be read ({e})', d.campaign)
    return Decision(d.release, d.why, d.campaign, now, tuple(c.get('windows', [])), str(c.get('agent', '0')))
