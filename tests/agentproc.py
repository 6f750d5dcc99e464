"""A real agent process with models that are words: `python agentproc.py ROOT PORT`."""
import signal, sys
from tinyfleet import Word, prove_word
from edgenb.agent.service import Agent

if __name__ == '__main__':
    with Agent(sys.argv[1], load=Word, prove=prove_word) as agent:
        signal.signal(signal.SIGTERM, lambda *a: agent.stop())
        signal.signal(signal.SIGHUP, lambda *a: agent.wake(poll=not (agent.root/'request.json').exists()))
        agent.machine.step()
        print(agent.listen(int(sys.argv[2])), flush=True)
        agent.run()
