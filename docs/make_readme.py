"README.md from nbs/index.ipynb: its markdown as it stands, its code in fences."
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def readme() -> str:
    cells = json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']
    blocks = [''.join(c['source']) if c['cell_type'] == 'markdown' else f"```python\n{''.join(c['source'])}\n```"
              for c in cells if not ''.join(c['source']).startswith('#|')]
    return '\n\n'.join(b for b in blocks if b.strip()) + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(readme(), encoding='utf-8')
