"""The list of errors still fits the code, and the document is of it; what the errors do, `make mutations` tries."""

import re

import pytest
from mutations import table
from mutations.languages import LANGUAGES, ROOT
from mutations.layers import LAYERS

MUTATIONS = [(language, mutation) for language in LANGUAGES.values() for mutation in language.mutations]


def key(language, mutation):
    return language.path(mutation), mutation.name


@pytest.mark.parametrize(("language", "mutation"), MUTATIONS, ids=[": ".join(key(*x)) for x in MUTATIONS])
def test_the_error_can_still_be_made(language, mutation):
    text = (ROOT / language.path(mutation)).read_text()
    assert mutation.put_into(text) != text
    with pytest.raises(ValueError, match=re.escape(mutation.name)):
        mutation.put_into(text.replace(mutation.old, ""))
    # Each layer has something to run.
    for layer, names in {"cpu tests": mutation.tests, "ttsem": mutation.ttsem}.items():
        assert bool(names) == (layer in language.layers)
    for name in mutation.tests + mutation.ttsem:
        file, _, function = name.partition("::")
        assert f"def {function.split('[')[0]}" in (ROOT / "tests" / file).read_text()
    for name in mutation.compiled:
        assert name == "triton" if language is LANGUAGES["triton"] else (ROOT / language.folder / name).exists()


def test_the_document_lists_the_errors_and_each_was_noticed():
    found = table.read()
    assert list(found) == [key(*x) for x in MUTATIONS]
    for language, mutation in MUTATIONS:
        assert found[key(language, mutation)].keys() <= set(language.layers_of(mutation))
    assert table.unnoticed(found) == []


def test_what_was_not_run_again_stays(tmp_path):
    path = tmp_path / "table.md"
    first, second = MUTATIONS[0], MUTATIONS[1]
    found = {key(*first): {"simt": "value", "simt-tsan": ""}, ("gone.cu", "an error of before"): {"simt": "value"}}
    table.write(found, path)
    found = table.read(path)
    assert list(found) == [key(*x) for x in MUTATIONS]
    assert found[key(*first)] == {"simt": "value", "simt-tsan": ""}
    assert found[key(*second)] == {}
    found[key(*first)]["simt-asan"] = "out of bounds"
    table.write(found, path)
    assert table.read(path) == found
    lines = path.read_text().splitlines()
    row, other = (next(line for line in lines if key(*x)[0] in line and x[1].name in line) for x in (first, second))
    cells = dict(zip(LAYERS, ("value", "out of bounds", "–", "", "", ""), strict=True))
    assert row.endswith(" | " + " | ".join(cells.values()) + " |")
    assert other.endswith(" | ? | ? | ? |  |  |  |")


def test_an_error_is_unnoticed_when_all_its_layers_say_nothing():
    language, mutation = MUTATIONS[0]
    nothing = dict.fromkeys(language.layers, "")
    assert table.unnoticed({key(language, mutation): nothing}) == [mutation.name]
    assert table.unnoticed({key(language, mutation): {**nothing, "simt-tsan": "race"}}) == []
    assert table.unnoticed({key(language, mutation): {"simt": ""}}) == []
