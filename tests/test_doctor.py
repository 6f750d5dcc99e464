"""What is missing is named, with the command that adds it."""
import importlib.metadata
import pytest
from edgenb.core import EdgenbError
from edgenb.doctor import machine_facts, parts


class Toy:
    "An installed edgenb whose metadata are given."
    def __init__(self, monkeypatch, requires, versions):
        monkeypatch.setattr(importlib.metadata, 'requires', lambda name: requires)
        def version(name):
            if name not in versions: raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]
        monkeypatch.setattr(importlib.metadata, 'version', version)


def test_every_extra_says_what_it_is_for():
    assert all(p.what for p in parts())


def test_what_is_missing_or_too_old_is_named(monkeypatch):
    Toy(monkeypatch, ['numpy>=2.0', "torch>=2.9; extra == 'lab'", "tqdm>=4; extra == 'lab'", "edgenb[lab]; extra == 'text'", "spacy>=3.8,<3.9; extra == 'text'", "never; sys_platform == 'nowhere' and extra == 'lab'"],
        {'numpy': '2.1', 'torch': '2.8', 'tqdm': '4.67', 'spacy': '3.8.2'})
    found = {p.extra: p for p in parts()}
    assert found[''].state == 'ready' and not found[''].command
    assert found['lab'].wrong == ('torch 2.8 (needs >=2.9)',) and found['lab'].missing == () and found['lab'].state == 'wrong version'
    assert found['text'].wrong == found['lab'].wrong and found['text'].command.endswith("[text]'")
    assert found['litert'].state == 'ready'   # it asks for nothing here


def test_an_edgenb_that_is_not_installed_says_how_to_install_it(monkeypatch):
    def requires(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, 'requires', requires)
    with pytest.raises(EdgenbError, match='pip install -e'): parts()


def test_the_machine_is_described_where_nothing_was_run_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('EDGENB_CACHE', str(tmp_path/'nothing'))
    facts = machine_facts()
    assert facts['workspace'] == str(tmp_path) and 'GiB free' in facts['runs'] and '(not fetched)' in facts['weights']
    assert not (tmp_path/'nothing').exists() and not (tmp_path/'runs').exists()   # looking leaves nothing
