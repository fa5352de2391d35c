"""The command line: parse, call, print, exit. No decision is made here.

Heavy libraries are imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from secure_export import __version__
from secure_export.errors import NoVerdict, PolicyError, SecureExportError
from secure_export.options import (
    SHIPPED_ONES,
    env,
    json_option,
    overrides,
    policy_option,
    subject_options,
)
from secure_export.records.measured import EXIT_CODES
from secure_export.words import LONGEST, escaped

EPILOG = """\b
Exit codes:
  0    released
  1    unexpected (a bug)
  2    usage, or a policy that cannot be used
  3    refused: measured, and a rule does not hold; nothing is released
  4    no verdict: something could not be loaded, measured or written, or too few samples
  130  interrupted; the same command resumes
"""
VERIFIED = """\b
Exit codes:
  0    it holds: files, report and verdict agree
  1    unexpected (a bug)
  2    usage, or a policy that cannot be used
  3    they agree, and a rule does not hold
  4    they do not agree, or something could not be read or decided
"""


class Commands(click.Group):
    """Turns what was raised into one line and an exit code; the only place that does."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, with this tool's errors and exit codes."""
        try:
            return super().invoke(ctx)
        except SecureExportError as error:
            # A policy may have several problems, a line each; any other error is one line.
            lines = "\n" if isinstance(error, PolicyError) else ""
            click.echo(f"error: {escaped(error.message, lines)}", err=True)
            if error.hint:
                click.echo(f"hint: {escaped(error.hint)}", err=True)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted; the same command resumes", err=True)
            ctx.exit(130)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="secure-export")
def main() -> None:
    """Locate, purify and verify a classifier under compression; release only the files that were measured."""


@main.command(epilog=EPILOG)
@policy_option()
@subject_options
@env("out", "--out", "-o", type=click.Path(path_type=Path), help="Run directory; default runs/POLICY-MODEL.")
@json_option
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def run(policy: str, out: Path | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Do the whole job, and release the files only when every rule of the policy holds.

    The run directory gets report.json, report.html, report.md, and release/ when the verdict approves. The
    same command on the same run directory goes on where it was stopped.
    """
    from secure_export.console import conclusion, showing, table

    loaded = _policy(policy, given)
    given_file = Path(loaded.subject.artifact or loaded.subject.model or "model")
    name = re.sub(r"[^\w.@=+-]", "_", f"{Path(policy).stem}-{given_file.stem}")[:LONGEST]
    folder = out or Path("runs", name)
    with showing(quiet) as progress:
        from secure_export import pipeline

        report = pipeline.run(loaded, folder, progress=progress)
    if as_json:
        _print_json(report.verdict)
    else:
        click.echo(table(report))
    for line in conclusion(report, str(folder)):
        click.echo(escaped(line), err=True)
    click.get_current_context().exit(EXIT_CODES[report.verdict.outcome])


@main.command(epilog=EPILOG)
@click.argument("run_dir", type=click.Path(path_type=Path))
@policy_option()
@json_option
def judge(run_dir: Path, policy: str, as_json: bool) -> None:
    """Judge the measurements of RUN_DIR again under another policy, without torch. Releases nothing.

    Reads report.json alone, not the files that it is about: `verify` does, in a folder release/.
    """
    from secure_export.console import finding_line
    from secure_export.policy import judge as judged
    from secure_export.release import SUMS
    from secure_export.report.schema import load_report

    verdict = judged(_policy(policy, {}), load_report(_report_of(run_dir)))
    if as_json:
        _print_json(verdict)
    else:
        for finding in verdict.findings:
            click.echo(escaped(finding_line(finding)))
        click.echo({"released": "would be released"}.get(verdict.outcome, verdict.outcome.replace("_", " ")))
    if (run_dir / SUMS).exists():
        click.echo(
            f"only report.json was read; the files beside it: secure-export verify {run_dir}", err=True
        )
    click.get_current_context().exit(EXIT_CODES[verdict.outcome])


@main.command(epilog=VERIFIED)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@policy_option(required=False, purpose="Judge by this one too. ")
@click.option("--sha256", help="Of SHA256SUMS or report.json, as the sender told you by another way.")
@json_option
def verify(folder: Path, policy: str | None, sha256: str | None, as_json: bool) -> None:
    """Check a FOLDER release/ that you were given, without torch: files, report and verdict.

    It holds the files that SHA256SUMS names, with these digests, and no other; its models are those that the
    report measured and releases, one to one; and the report's verdict follows again from what it counts, by
    the policy that it carries and by yours.

    Nothing of it is signed: what is shown is that the folder agrees with itself, not who made it. For that,
    get one digest by another way (--sha256).
    """
    from secure_export.console import verified_lines
    from secure_export.verify import verify as verified

    found = verified(folder, _policy(policy, {}) if policy else None, _digest(sha256))
    if as_json:
        _print_json(found, without="report")
    else:
        for line in verified_lines(found):
            click.echo(escaped(line))
    click.get_current_context().exit(EXIT_CODES[found.verdict.outcome])


@main.command()
@policy_option()
@subject_options
def validate(policy: str, **given: Any) -> None:
    """Check a policy and its plug-ins, and say what a run would do. Measures nothing."""
    from secure_export.policy import check_plugins

    loaded = _policy(policy, given)
    check_plugins(loaded)
    for label, path in _given_paths(loaded):
        if path and ":" not in path and not Path(path).exists():
            raise NoVerdict(f"{label}: no such file or folder: {path}")
    settings = loaded.expanded_settings()
    shipped = [setting.name for setting in settings if setting.released]
    click.echo(
        f"{loaded.path}: {len(settings)} settings, {len(loaded.triggers)} triggers, "
        f"{len(loaded.rules)} rules; releases {', '.join(shipped)}"
    )
    for setting in settings:
        steps = " → ".join(str(step["kind"]) for step in setting.steps) or "full precision"
        click.echo(f"  {setting.name}: {steps} → {setting.format['kind']}")
    if loaded.evidence is None:
        click.echo("  no evidence section: no file is searched for triggers that the policy does not name")
    else:
        searched = ", ".join(loaded.evidence.names)
        click.echo(f"  every file is searched: {searched}; {len(loaded.evidence.rules)} rules on it")


@main.command("list")
@click.argument("family", required=False)
@click.option("--schema", type=click.Choice(["report", "policy"]), help="Print a JSON schema instead.")
@json_option
def list_(family: str | None, schema: str | None, as_json: bool) -> None:
    """What a policy can say: its own keys (`policy`), and plug-ins by FAMILY with their parameters."""
    from secure_export import registry
    from secure_export.policy import parts

    if schema:
        click.echo(json.dumps(_schema(schema), indent=2))
        return
    known = ("policy", *registry.FAMILIES)
    if family is not None and family not in known:
        raise PolicyError(f"no family {family!r}", hint=f"known: {', '.join(known)}")
    found = {
        name: parts()
        if name == "policy"
        else {kind: registry.describe(name, kind) for kind in registry.names(name)}
        for name in ([family] if family else known)
    }
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str))
        return
    for name, kinds in found.items():
        click.echo(name)
        for kind, described in kinds.items():
            click.echo(f"  {kind}: {described['summary']}")
            for parameter, field in described["parameters"].items():
                click.echo(
                    f"      {parameter} = {_in_yaml(field['default'])}  {field['description']}".rstrip()
                )


@main.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path())
def init(folder: Path) -> None:
    """Write a commented policy.yaml to start from into FOLDER. Never overwrites."""
    target = folder / "policy.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(_found("strict").read_text(encoding="utf-8"))
    except FileExistsError:
        raise PolicyError(f"{target} exists", hint="name another folder") from None
    except OSError as error:
        raise PolicyError(f"{target}: cannot be written: {error.strerror}") from error
    click.echo(f"{target} written; next: secure-export validate --policy {target}")


@main.command(epilog=EPILOG)
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def demo(out: Path, quiet: bool) -> None:
    """The whole job on handwritten digits, offline: plant two backdoors, find, purify, sweep, release."""
    from secure_export.console import showing

    with showing(quiet) as progress:
        from secure_export.demo import run_demo

        code = run_demo(out, progress, click.echo)
    click.get_current_context().exit(code)


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["html", "markdown", "json"]), default="html")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Default: stdout.")
def report(run_dir: Path, form: str, output: Path | None) -> None:
    """Draw the report of RUN_DIR again from its report.json."""
    from secure_export.report.documents import documents
    from secure_export.report.schema import FORMATS, load_report

    content = documents(load_report(_report_of(run_dir)))[FORMATS[form]]
    if output is None:
        click.echo(content.decode())
        return
    try:
        output.write_bytes(content)
    except OSError as error:
        raise NoVerdict(f"{output}: cannot be written: {error.strerror}") from error


def _given_paths(policy: Any) -> list[tuple[str, str | None]]:
    subject = policy.subject
    data = policy.data
    return [
        *(("model", subject.model), ("artifact", subject.artifact)),
        *(("data", data.path), ("holdout data", data.holdout_path)),
    ]


def _policy(name: str, given: dict[str, Any]) -> Any:
    from secure_export.policy import load_policy

    return load_policy(_found(name), overrides(given))


def _found(name: str) -> Path:
    """The shipped policy `name`, or the file: nothing in the working directory stands in for `strict`."""
    from secure_export.policy import shipped

    path = Path(name)
    bare = path.name == name and not path.suffix
    found = shipped(name) if bare else None
    if found is None and bare and not path.is_file():
        raise PolicyError(f"no file {name!r}, and no policy of that name ships", hint=SHIPPED_ONES)
    return found or path


def _report_of(run_dir: Path) -> Path:
    return run_dir / "report.json" if run_dir.is_dir() else run_dir


def _schema(which: str) -> dict[str, Any]:
    if which == "report":
        from secure_export.report.schema import json_schema

        return json_schema()
    from secure_export.policy import Policy

    return Policy.model_json_schema()


def _in_yaml(value: Any) -> str:
    """As one would write it in a policy."""
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n...\n").strip()


def _digest(text: str | None) -> str | None:
    if text is not None and not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise PolicyError(f"--sha256: got {text!r}, expected 64 hexadecimal digits")
    return text and text.lower()


def _print_json(record: Any, without: str = "") -> None:
    from dataclasses import asdict

    click.echo(json.dumps({key: value for key, value in asdict(record).items() if key != without}, indent=2))
