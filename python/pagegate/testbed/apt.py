"""Where the kernel's source package comes from: the archives that this host's apt is set up for.

A suite that apt is not set up for is fetched from a Debian archive that apt's sources name, with the options of that
archive's entry there, such as Signed-By. For this apt is given lists and sources in the testbed's cache. It still uses
the host's keys, proxies and passwords; the host's configuration and lists are only read.
"""
# Starting apt's programs, by the names that PATH resolves, is what this module does.
# ruff: noqa: S603

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pagegate.errors import TestbedError
from pagegate.testbed.kernel import KERNEL_VARIABLE, Source, cache_directory, cache_errors

OLDEST = (6, 12)
"""The oldest series that pagegate is tested on."""

PREFERRED = (7, 3)
"""The series that is taken if it is offered; else it is the newest."""

ELSEWHERE = f"build the kernel on another Debian machine and name its image with --kernel or {KERNEL_VARIABLE}"
"""What to do where the source cannot be got, for error messages."""

# Commands that the host's configuration runs around an update are for the host's own lists.
_NO_HOOKS = "".join(f"#clear APT::Update::{hook};\n" for hook in ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success"))

_TARGET = ("ORIGIN", "LABEL", "TARGET_OF", "CREATED_BY", "COMPONENT", "SITE", "REPO_URI", "SOURCESENTRY")


@dataclass(frozen=True)
class Apt:
    """How to call apt's programs for one suite, or for all that apt is set up for."""

    place: str
    """What is searched, for error messages."""

    options: tuple[str, ...] = ()

    def output(self, program: str, *words: str) -> str:
        """Run apt-get or apt-cache and return what it printed.

        Raises:
            TestbedError: it failed; the message has the first error that it printed.

        """
        done = subprocess.run(
            [program, *self.options, *words],
            env={**os.environ, "LC_ALL": "C"},
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.startswith("E: ")] or done.stderr.splitlines()
            raise TestbedError(
                f"{program} failed: {said[0].removeprefix('E: ') if said else f'status {done.returncode}'}"
            )
        return done.stdout


def choose_source(suite: str | None = None, series: tuple[int, int] | None = None) -> Source:
    """Return the kernel source to build from: of that series, or else the preferred or the newest that is offered.

    Raises:
        TestbedError: none is offered.

    """
    apt = apt_for(suite)
    offered: dict[tuple[int, int], str] = {}
    for line in apt.output("apt-cache", "search", "--names-only", "^linux-source-[0-9]+[.][0-9]+$").splitlines():
        package = line.split(" ", 1)[0]
        major, _, minor = package.removeprefix("linux-source-").partition(".")
        if package.startswith("linux-source-") and major.isdigit() and minor.isdigit():
            offered[int(major), int(minor)] = package
    remedy = (
        "name another suite with --suite"
        if suite
        else "run apt-get update, or take another suite of the Debian archive that apt uses: --suite trixie-backports"
    )
    if series is not None:
        chosen = series
        if series not in offered:
            raise TestbedError(f"{apt.place} offers no linux-source-{series[0]}.{series[1]}: {remedy}")
    else:
        remedy += f"; or {ELSEWHERE}"
        fitting = [one for one in offered if one >= OLDEST]
        if not fitting:
            raise TestbedError(f"{apt.place} offers no linux-source of {OLDEST[0]}.{OLDEST[1]} or later: {remedy}")
        chosen = PREFERRED if PREFERRED in fitting else max(fitting)
    package = offered[chosen]
    candidate = re.search(r"^ *Candidate: (\S+)", apt.output("apt-cache", "policy", package), re.MULTILINE)
    if candidate is None or candidate[1] == "(none)":
        raise TestbedError(f"{apt.place} knows {package} but offers no version of it: {remedy}")
    return Source(package, candidate[1])


def apt_for(suite: str | None, otherwise: str = ELSEWHERE) -> Apt:
    """Return how to call apt for this suite, and update its lists; None is whatever apt is set up for.

    Args:
        suite: as trixie-backports.
        otherwise: what the user can do without apt, for error messages.

    Raises:
        TestbedError: apt's sources name no Debian archive, or none that has the suite.

    """
    if suite is None:
        return Apt("apt")
    if not re.fullmatch(r"[a-z][a-z0-9/-]*", suite):
        raise TestbedError(f"{suite!r} is no Debian suite: write one as trixie-backports")
    refusals = []
    for archive in _debian_archives(suite, otherwise):
        apt = _own_lists(f"{suite} of {archive.site}", suite.replace("/", "_"), archive.entry(suite))
        try:
            apt.output("apt-get", "--quiet", "--error-on=any", "update")
        except TestbedError as error:
            refusals.append(f"  {archive.site}: {error}")
        else:
            return apt
    raise TestbedError(
        "\n".join(
            [
                f"{suite} cannot be fetched from any Debian archive that apt's sources name:",
                *refusals,
                f"name a suite that is there with --suite, add an archive that has {suite} to apt's sources, or "
                f"{otherwise}",
            ]
        )
    )


@dataclass(frozen=True)
class _Archive:
    """An archive and its entry in apt's sources: a line of a .list file, or a stanza of a .sources file."""

    uri: str
    site: str
    """The URI without a password, for messages."""

    file: Path
    number: int
    """Of the line or the stanza, from 1."""

    def entry(self, suite: str) -> tuple[str, str]:
        """Return name and text of a sources file for another suite of this archive, with the same options."""
        text = self.file.read_text()
        if self.file.suffix == ".sources":
            options = _stanza_options(text, self.number)
            return "archive.sources", "\n".join(
                ["Types: deb", f"URIs: {self.uri}", f"Suites: {suite}", "Components: main", *options, ""]
            )
        bracketed = re.match(r"\s*deb\s*(\[[^]]*\])", text.splitlines()[self.number - 1])
        return "archive.list", f"deb {bracketed[1] if bracketed else ''} {self.uri} {suite} main\n"


def _stanza_options(text: str, number: int) -> list[str]:
    """The fields of a stanza but for those that `_Archive.entry` sets."""
    # apt does not count a stanza that has only comments.
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    stanzas = [stanza for stanza in re.split(r"\n\s*\n", "\n".join(lines)) if stanza.strip()]
    fields = re.split(r"\n(?![ \t])", stanzas[number - 1].strip("\n"))
    place = ("types", "uris", "suites", "components", "enabled")
    return [field for field in fields if field.partition(":")[0].strip().lower() not in place]


def _debian_archives(suite: str, otherwise: str) -> list[_Archive]:
    """The Debian archives that apt's sources name, each once."""
    targets = _targets(Apt("apt"))
    if not targets:
        # As in a fresh container. Only root may update the host's lists, so get a copy of them. A list that cannot be
        # got is missing from the targets.
        apt = _own_lists("apt", "_host", None)
        with contextlib.suppress(TestbedError):
            apt.output("apt-get", "--quiet", "update")
        targets = _targets(apt)
    archives: dict[str, _Archive] = {}
    for target in targets:
        if (target["ORIGIN"], target["LABEL"]) == ("Debian", "Debian"):
            file, _, number = target["SOURCESENTRY"].rpartition(":")
            archive = _Archive(target["REPO_URI"], target["SITE"], Path(file), int(number))
            archives.setdefault(archive.uri, archive)
    if not archives:
        sites = sorted({target["SITE"] for target in targets})
        known = f"has package lists of {', '.join(sites)} only" if sites else "can get none (apt-get update says why)"
        raise TestbedError(
            f"{suite} can be fetched only from a Debian archive whose package lists apt has, and apt {known}: "
            f"add a Debian archive to apt's sources and run apt-get update, or {otherwise}"
        )
    return list(archives.values())


def _targets(apt: Apt) -> list[dict[str, str]]:
    """The package lists of components named main that apt has downloaded."""
    form = "\t".join(f"$({name})" for name in _TARGET)
    lines = apt.output("apt-get", "indextargets", "--format", form).splitlines()
    targets = [dict(zip(_TARGET, line.split("\t"), strict=True)) for line in lines]
    kind = ("deb", "Packages", "main")
    return [one for one in targets if (one["TARGET_OF"], one["CREATED_BY"], one["COMPONENT"]) == kind]


def _own_lists(place: str, name: str, entry: tuple[str, str] | None) -> Apt:
    """Set apt up with package lists of its own in the cache; its sources are this entry, or else the host's."""
    directory = cache_directory() / "apt" / name
    settings = {
        "Dir::State::Lists": directory / "lists",
        "Dir::State::Status": directory / "status",
        "Dir::Cache": directory,
        "Acquire::Languages": "none",
    }
    with cache_errors():
        for part in ("lists/partial", "archives/partial"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        # An entry may have a password in its URI.
        (directory / "parts").mkdir(mode=0o700, exist_ok=True)
        (directory / "status").touch()
        (directory / "apt.conf").write_text(_NO_HOOKS)
        for old in (directory / "parts").iterdir():
            old.unlink()
        if entry is not None:
            file, text = entry
            (directory / "parts" / file).write_text(text)
            # The host's pins and its default release are for the suites that it is set up for.
            settings |= {
                "Dir::Etc::SourceList": "/dev/null",
                "Dir::Etc::SourceParts": directory / "parts",
                "Dir::Etc::Preferences": "/dev/null",
                "Dir::Etc::PreferencesParts": "/dev/null",
                "APT::Default-Release": "",
            }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    return Apt(place, ("-c", str(directory / "apt.conf"), *options))
