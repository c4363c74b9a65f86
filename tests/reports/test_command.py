import json
import sys
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from vlmc.errors import VlmcError
from vlmc.reports import command, write_all
from vlmc.reports.command import profile_folder, report


@pytest.fixture
def artefact(tmp_path: Path, sample: dict[str, Any]) -> Path:
    folder = tmp_path / "profile" / "cpu"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(sample), encoding="utf-8")
    return tmp_path


def test_all_files_are_written_beside_the_report(artefact: Path) -> None:
    folder = artefact / "profile" / "cpu"
    assert write_all(folder) == [folder / "report.csv", folder / "report.md", folder / "report.html"]
    assert sorted(path.name for path in folder.iterdir()) == ["report.csv", "report.html", "report.json", "report.md"]


def test_a_malformed_report_leaves_the_files_of_before(artefact: Path) -> None:
    folder = artefact / "profile" / "cpu"
    write_all(folder)
    before = (folder / "report.html").read_bytes()
    (folder / "report.json").write_text('{"schema": 1, "variants": [')
    with pytest.raises(VlmcError, match="not valid JSON"):
        write_all(folder)
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra_the_page_alone_is_left_out(
    artefact: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert [path.name for path in write_all(artefact / "profile" / "cpu")] == ["report.csv", "report.md"]
    assert f"report.html is left out: {missing} is missing" in capsys.readouterr().err


def test_the_only_profile_is_taken(artefact: Path) -> None:
    assert profile_folder(artefact, "") == artefact / "profile" / "cpu"
    assert profile_folder(artefact, "cpu") == artefact / "profile" / "cpu"


def test_a_profile_that_is_not_there_is_named_with_those_that_are(artefact: Path) -> None:
    with pytest.raises(VlmcError, match=r"no profile for device 'orin'\. Found: cpu\. To mend it: choose one of these"):
        profile_folder(artefact, "orin")
    with pytest.raises(VlmcError, match=r"There is no artefact .*nowhere\. To mend it: check the path"):
        profile_folder(artefact / "nowhere", "")
    with pytest.raises(VlmcError, match=r"no profile\. Found: none\. To mend it: run `vlmc profile"):
        profile_folder(artefact / "profile", "")
    with pytest.raises(VlmcError, match="no profile for device"):
        profile_folder(artefact, "../profile/cpu")


@pytest.mark.parametrize("name", ["profile", "profile/cpu", "profile/cpu/samples"])
def test_a_profile_that_is_a_link_out_of_the_artefact_is_refused(name: str, artefact: Path) -> None:
    (artefact / "profile" / "cpu" / "samples").mkdir()
    outside = artefact.parent / f"{artefact.name}-outside"
    (artefact / name).rename(outside)
    (artefact / name).symlink_to(outside)
    with pytest.raises(VlmcError, match=f"'{name}' leaves the folder"):
        profile_folder(artefact, "")


def test_of_several_profiles_one_has_to_be_chosen(artefact: Path) -> None:
    (artefact / "profile" / "rpi5").mkdir()
    (artefact / "profile" / "rpi5" / "report.json").write_text("{}")
    with pytest.raises(VlmcError, match=r"several devices. Found: cpu, rpi5"):
        profile_folder(artefact, "")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(report, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_command_prints_the_table_and_what_it_wrote(artefact: Path) -> None:
    printed = run(artefact)
    assert "ONNX Runtime int8" in printed
    assert printed.splitlines()[-1] == str(artefact / "profile" / "cpu" / "report.html")


def test_json_is_nothing_but_json(artefact: Path) -> None:
    printed = json.loads(run(artefact, "--json"))
    assert [Path(path).name for path in printed["files"]] == ["report.csv", "report.md", "report.html"]
    assert "no significant difference" in " ".join(printed["findings"])


def test_the_numbers_are_made_again_from_the_raw_samples(
    artefact: Path, sample: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artefact / "profile" / "cpu"
    (folder / "samples").mkdir()
    (folder / "samples" / "run.json").write_text("{}")
    (folder / "report.json").unlink()
    monkeypatch.setattr(command, "summarize", lambda at: sample | {"summarized": str(at)})
    run(artefact, "--json")
    assert json.loads((folder / "report.json").read_text())["summarized"] == str(folder)


@pytest.mark.parametrize("opens", [True, False])
def test_the_page_is_opened_where_there_is_a_browser(
    artefact: Path, opens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: asked.append(address) or opens)
    result = CliRunner().invoke(report, [str(artefact), "--open"], catch_exceptions=False)
    assert asked == [(artefact / "profile" / "cpu" / "report.html").resolve().as_uri()]
    assert ("No browser could be opened" in result.stderr) is not opens
