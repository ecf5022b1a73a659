"""`pagegate testbed` but for the machine itself, whose place stand-ins take: booting it takes too long here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from pagegate import testbed
from pagegate.errors import TestbedError
from pagegate.testbed import apt, builder, kernel, machine, progress, selftests
from pagegate.testbed.command import testbed as command
from rich.progress import Progress

# Stands in for vng and for the machine: runs what the machine would be asked to run here, without the mounts.
FAKE_VNG = r"""#!/bin/sh
while [ "$1" != --run ]; do shift; done
job=${2%/*}
echo "$@" >"$FAKE_LOG"
echo "the kernel's chatter"
case $FAKE_MODE in
panic)
    echo '[    1.0] Kernel panic - not syncing: out of cheese'
    exit 255 ;;
gone)
    exit 0 ;;
refuse)
    echo 'failed its kernel offers no /dev/kvm' >"$job/status"
    exit 1 ;;
esac
sed -n '/^cd -- /,$p' "$job/launch" | sed "s#/dev/virtio-ports/pagegate\.#$job/#g; s#>&3#>>$job/status#" >"$job/here"
/bin/sh "$job/here"
exit 0
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_image(path: Path, release: str = "7.3.4") -> Path:
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x300).to_bytes(2, "little")
    text = f"{release} (someone@somewhere) #1".encode()
    image[0x500 : 0x500 + len(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    return path


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(kernel.KERNEL_VARIABLE, raising=False)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)


@pytest.fixture
def fake_machine(tmp_path, monkeypatch):
    """A machine that is this host. Returns the file where the stand-in for vng leaves its arguments."""
    vng = write_program(tmp_path / "bin" / "vng", FAKE_VNG)
    log = tmp_path / "vng.log"
    monkeypatch.setattr(machine, "find_tools", lambda: machine.Tools(vng=vng, qemu=Path("/bin/false")))
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("FAKE_MODE", "run")
    monkeypatch.setenv(kernel.KERNEL_VARIABLE, str(write_image(tmp_path / "bzImage")))
    return log


class TestKernelLookup:
    def test_order(self, tmp_path, monkeypatch):
        with pytest.raises(TestbedError, match=r"pagegate testbed build .* --kernel or PAGEGATE_TESTBED_KERNEL"):
            testbed.find_kernel()
        built = self.build("7.3.4")
        assert testbed.find_kernel() == built
        from_environment = write_image(tmp_path / "environment" / "bzImage")
        monkeypatch.setenv(kernel.KERNEL_VARIABLE, str(from_environment))
        assert testbed.find_kernel() == from_environment
        named = write_image(tmp_path / "named" / "bzImage")
        assert testbed.find_kernel(named) == named

    def test_the_newest_release_of_those_built(self):
        self.build("7.3.4")
        newest = self.build("7.10.1")
        self.build("6.12.117")
        assert testbed.find_kernel() == newest

    def test_a_kernel_of_another_configuration_is_none(self, monkeypatch):
        self.build("7.3.4")
        monkeypatch.setattr(kernel, "fragment", lambda: "CONFIG_SMP=n\n")
        with pytest.raises(TestbedError, match="no kernel"):
            testbed.find_kernel()

    @pytest.mark.parametrize("missing", ["bzImage", "kernel.json"])
    def test_an_unfinished_kernel_is_none(self, missing):
        (self.build("7.3.4").parent / missing).unlink()
        with pytest.raises(TestbedError, match="no kernel"):
            testbed.find_kernel()

    def test_a_publication_that_is_interrupted_leaves_no_image(self, tmp_path, monkeypatch):
        def interrupted(_fd):
            raise KeyboardInterrupt

        source = kernel.Source("linux-source-7.3", "7.3.4-1")
        image = write_image(tmp_path / "objects" / "bzImage")
        kernel.kernel_directory(source).mkdir(parents=True)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                kernel.publish(image, source)
        with pytest.raises(TestbedError, match="no kernel"):
            testbed.find_kernel()
        assert testbed.find_kernel(kernel.publish(image, source)).read_bytes() == image.read_bytes()

    def test_what_is_no_kernel_is_refused(self, tmp_path, monkeypatch):
        text = tmp_path / "text"
        text.write_text("no kernel")
        with pytest.raises(TestbedError, match="text is no x86 kernel image"):
            testbed.find_kernel(text)
        monkeypatch.setenv(kernel.KERNEL_VARIABLE, str(tmp_path / "absent"))
        with pytest.raises(
            TestbedError, match=r"absent, named by PAGEGATE_TESTBED_KERNEL, cannot be read: No such file"
        ):
            testbed.find_kernel()

    def test_the_key_depends_on_source_and_configuration(self, monkeypatch):
        keys = {kernel.kernel_directory(kernel.Source("linux-source-7.3", version)).name for version in ("1", "2")}
        monkeypatch.setattr(kernel, "fragment", lambda: "CONFIG_SMP=n\n")
        keys.add(kernel.kernel_directory(kernel.Source("linux-source-7.3", "1")).name)
        assert len(keys) == 3

    def test_a_relative_cache_directory_is_ignored(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert kernel.cache_directory() == Path.home() / ".cache" / "pagegate" / "testbed"

    @staticmethod
    def build(release: str) -> Path:
        source = kernel.Source("linux-source-" + ".".join(release.split(".")[:2]), f"{release}-1")
        directory = kernel.kernel_directory(source)
        directory.mkdir(parents=True)
        return kernel.publish(write_image(directory / "objects" / "bzImage", release), source)


class TestTools:
    def test_each_missing_one_is_named_with_its_package(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        monkeypatch.setattr(machine, "_has_udev", lambda: False)
        with pytest.raises(TestbedError, match=r"virtme-ng: pip install 'pagegate\[testbed\]'"):
            machine.find_tools()
        vng = write_program(tmp_path / "path" / "vng", "")
        with pytest.raises(TestbedError, match="package qemu-system-x86 "):
            machine.find_tools()
        qemu = write_program(tmp_path / "path" / "qemu-system-x86_64", "")
        with pytest.raises(TestbedError, match="package udev "):
            machine.find_tools()
        monkeypatch.setattr(machine, "_has_udev", lambda: True)
        assert machine.find_tools() == machine.Tools(vng, qemu)

    def test_the_vng_beside_the_interpreter_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        monkeypatch.setattr(machine, "_has_udev", lambda: True)
        write_program(tmp_path / "path" / "qemu-system-x86_64", "")
        write_program(tmp_path / "path" / "vng", "")
        beside = write_program(tmp_path / "bin" / "vng", "")
        assert machine.find_tools().vng == beside


@pytest.mark.usefixtures("fake_machine")
class TestRun:
    def test_arguments_arrive_exactly(self, capfdbinary):
        words = ["a b", "it's", '"q"', "$HOME `x`", "", "*", "new\nline", "ü", "--rw", "a\\b"]
        assert testbed.run([sys.executable, "-c", "import sys; print(sys.argv[1:])", *words]) == 0
        assert capfdbinary.readouterr().out.decode() == f"{words}\n"

    def test_output_and_errors_stay_apart_and_free_of_the_kernels(self, capfdbinary):
        assert testbed.run(["sh", "-c", "echo out; echo err >&2"]) == 0
        assert capfdbinary.readouterr() == (b"out\n", b"err\n")

    @pytest.mark.parametrize(
        ("script", "status"),
        [("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -SEGV $$", 139), ("no-such-command", 127)],
    )
    def test_the_status_is_the_commands(self, script, status, capfdbinary):
        assert testbed.run(["sh", "-c", script]) == status
        assert b"Killed" not in capfdbinary.readouterr().err

    def test_a_command_that_is_not_there(self):
        assert testbed.run(["no-such-command"]) == 127

    def test_the_environment(self, monkeypatch, capfdbinary):
        monkeypatch.setenv("PAGEGATE_TEST", "it's here")
        monkeypatch.setenv("SECRET", "not for the machine")
        given = {"SECRET_TOO": "a b\nc"}
        assert (
            testbed.run([sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"], env=given) == 0
        )
        seen = json.loads(capfdbinary.readouterr().out)
        assert seen["PAGEGATE_TEST"] == "it's here"
        assert seen["PATH"] == os.environ["PATH"]
        assert seen["SECRET_TOO"] == "a b\nc"
        assert seen["PAGEGATE_TESTBED"] == "1"
        assert "SECRET" not in seen

    def test_it_runs_in_the_current_directory(self, tmp_path, monkeypatch, capfdbinary):
        where = tmp_path / "a 'quoted' directory"
        where.mkdir()
        monkeypatch.chdir(where)
        assert testbed.run(["pwd"]) == 0
        assert capfdbinary.readouterr().out.decode() == f"{where}\n"

    def test_input(self, tmp_path, capfdbinary):
        assert testbed.run(["cat"]) == 0
        reader, writer = os.pipe()
        os.write(writer, b"from a pipe\n")
        os.close(writer)
        assert testbed.run(["cat"], stdin=reader) == 0
        os.close(reader)
        # More than a pipe holds, so that writing it has to wait for the command.
        text = b"0123456789abcde\n" * 20_000
        (tmp_path / "text").write_bytes(text)
        with (tmp_path / "text").open("rb") as file:
            assert testbed.run(["sh", "-c", "sleep 0.3; cat"], stdin=file.fileno()) == 0
        assert capfdbinary.readouterr().out == b"from a pipe\n" + text

    def test_input_that_the_command_does_not_want(self, tmp_path):
        (tmp_path / "text").write_bytes(b"x" * 1_000_000)
        with (tmp_path / "text").open("rb") as file:
            assert testbed.run(["true"], stdin=file.fileno()) == 0

    def test_output_comes_as_it_is_written(self):
        class Clock:
            times: list[float] = []  # noqa: RUF012

            def write(self, _data):
                self.times.append(time.monotonic())

            def flush(self):
                pass

        assert testbed.run(["sh", "-c", "echo 1; sleep 0.5; echo 2"], stdout=Clock()) == 0
        first, second = Clock.times
        assert second - first > 0.3

    def test_streams_that_are_closed(self, monkeypatch):
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", None)
        assert testbed.run(["sh", "-c", "echo out; echo err >&2; exit 5"]) == 5

    def test_a_panic_is_an_error_with_the_last_lines(self, monkeypatch):
        monkeypatch.setenv("FAKE_MODE", "panic")
        with pytest.raises(TestbedError, match=r"panicked \(not syncing: out of cheese\)") as caught:
            testbed.run(["true"])
        assert "the kernel's chatter" in str(caught.value)

    def test_a_machine_that_ends_without_a_status_is_an_error(self, monkeypatch):
        monkeypatch.setenv("FAKE_MODE", "gone")
        with pytest.raises(TestbedError, match="machine ended before the command began"):
            testbed.run(["true"])

    def test_what_the_machine_refuses_is_an_error(self, monkeypatch):
        monkeypatch.setenv("FAKE_MODE", "refuse")
        with pytest.raises(TestbedError, match="could not run the command: its kernel offers no /dev/kvm"):
            testbed.run(["true"])

    def test_a_timeout_ends_everything(self, tmp_path):
        with pytest.raises(testbed.TestbedTimeoutError, match=r"not ended after 0\.5 s") as caught:
            testbed.run(["sh", "-c", f"echo $$ >{tmp_path}/pid; sleep 60"], timeout=0.5)
        assert isinstance(caught.value, TimeoutError)
        wait_for_end(int((tmp_path / "pid").read_text()))

    def test_a_timeout_that_does_not_pass(self):
        assert testbed.run(["true"], timeout=60) == 0

    def test_nothing_is_left_behind(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
        (tmp_path / "tmp").mkdir()
        assert testbed.run(["true"]) == 0
        assert list((tmp_path / "tmp").iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"argv": []}, "argv is empty"),
            ({"cpus": 0}, "at least 1"),
            ({"cpus": 2, "deterministic": True}, "deterministic needs cpus=1"),
            ({"memory": "lots"}, "as 512M or 4G"),
            ({"timeout": 0}, "above 0 seconds"),
            ({"env": {"A B": "c"}}, "no name for an environment variable"),
        ],
    )
    def test_arguments_that_make_no_sense(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            testbed.run(**{"argv": ["true"], **arguments})

    def test_directories_that_cannot_be_writable(self, tmp_path):
        with pytest.raises(TestbedError, match="it is no directory"):
            testbed.run(["true"], rw=[tmp_path / "absent"])
        with pytest.raises(TestbedError, match="whole root"):
            testbed.run(["true"], rw=["/"])

    def test_a_directory_that_the_machine_has_its_own_of(self, monkeypatch):
        monkeypatch.chdir("/dev")
        with pytest.raises(TestbedError, match="has a /dev of its own"):
            testbed.run(["true"])


class TestMachine:
    def test_what_vng_is_asked_for(self, fake_machine, tmp_path):
        odd = tmp_path / "odd, 'quoted' directory"
        odd.mkdir()
        assert testbed.run(["true"], memory="512M", deterministic=True, rw=[odd]) == 0
        arguments = fake_machine.read_text()
        for wanted in (
            "--disable-kvm",
            "--cpus 1",
            "--memory 512M",
            "-icount shift=0,sleep=off",
            "mount_tag=pagegate0",
        ):
            assert wanted in arguments
        assert "quoted" not in arguments

    def test_the_clock_is_ordinary_by_default(self, fake_machine):
        assert testbed.run(["true"]) == 0
        assert "--memory 4G" in fake_machine.read_text()
        assert "icount" not in fake_machine.read_text()

    @pytest.mark.parametrize(("asked", "all_of_them"), [(None, 3), (1, 1), (2, 3), (4, 5)])
    def test_the_first_of_several_cpus_is_kept_free_of_guests(self, fake_machine, monkeypatch, asked, all_of_them):
        scripts = []
        write = machine._Machine.launch_script
        monkeypatch.setattr(
            machine._Machine, "launch_script", lambda self, **how: scripts.append(write(self, **how)) or scripts[-1]
        )
        assert testbed.run(["true"], cpus=asked) == 0
        assert f"--cpus {all_of_them} " in fake_machine.read_text()
        assert ("taskset" in scripts[0]) == (all_of_them > 1)
        assert all_of_them == 1 or f"taskset -cp 1-{all_of_them - 1} $$" in scripts[0]

    def test_the_temporary_directory_needs_no_quoting(self, monkeypatch):
        for unfit in ("/some where", "/with,comma", "/run/user/0", "/dev/shm", "/var/tmp"):
            monkeypatch.setattr(machine.tempfile, "gettempdir", lambda unfit=unfit: unfit)
            assert machine._plain_temporary_directory() == "/tmp"

    @pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
    def test_no_machine_is_left_when_this_process_is_ended(self, name, fake_machine, tmp_path):
        program = (
            "import sys; from pathlib import Path; from pagegate.testbed import machine\n"
            f"machine.find_tools = lambda: machine.Tools(Path({str(tmp_path / 'bin/vng')!r}), Path('/bin/false'))\n"
            f"machine.run(['sh', '-c', 'echo $$ >{tmp_path}/pid; sleep 60'])\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stderr=subprocess.DEVNULL,
            # Where the tests run in the background of a script, SIGINT is ignored, and would be here.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
            process.send_signal(getattr(signal, name))
            assert process.wait(timeout=10) != 0
        finally:
            process.kill()
            process.wait()
        wait_for_end(int((tmp_path / "pid").read_text()))
        assert fake_machine.exists()


class TestCommand:
    @pytest.fixture
    def call(self):
        return lambda *arguments: CliRunner().invoke(command, arguments, prog_name="pagegate testbed")

    def test_status_and_output(self, call, fake_machine):
        result = call("--cpus", "1", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
        assert (result.exit_code, result.stdout, result.stderr) == (7, "out\n", "err\n")
        assert "--cpus 1" in fake_machine.read_text()

    @pytest.mark.usefixtures("fake_machine")
    def test_a_command_named_like_a_subcommand(self, call, tmp_path, monkeypatch):
        write_program(tmp_path / "path" / "build", "#!/bin/sh\necho mine\n")
        monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
        assert call("--", "build").stdout == "mine\n"

    @pytest.mark.usefixtures("fake_machine")
    def test_environment_options(self, call, monkeypatch):
        monkeypatch.setenv("MINE", "1")
        result = call("--env", "MINE", "--env", "OTHER=a=b", "--", "sh", "-c", "echo $MINE $OTHER")
        assert result.stdout == "1 a=b\n"
        monkeypatch.delenv("MINE")
        result = call("--env", "MINE", "--", "true")
        assert result.exit_code == 2
        assert "MINE is not set here" in result.stderr

    def test_what_is_missing_is_an_error_that_the_command_line_makes_status_3(self, call):
        assert isinstance(call("--", "true").exception, TestbedError)

    def test_status_3(self):
        result = subprocess.run(
            [sys.executable, "-c", "from pagegate.cli import main; main()", "testbed", "--", "true"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 3
        assert result.stderr.startswith("pagegate: the testbed has no kernel")

    @pytest.mark.usefixtures("fake_machine")
    def test_a_timeout_is_status_124(self, call):
        result = call("--timeout", "0.3", "--", "sleep", "60")
        assert result.exit_code == 124
        assert "pagegate: the command had not ended after 0.3 s" in result.stderr

    @pytest.mark.usefixtures("fake_machine")
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["ls", "-l"], "'ls' is no subcommand. To run it in the machine, write it after --"),
            (["--cpus", "1"], "there is no COMMAND"),
            (["--"], "there is no COMMAND"),
            (["--deterministic", "--cpus", "2", "--", "true"], "deterministic needs cpus=1"),
            (["--memory", "x", "--", "true"], "as 512M or 4G"),
            (["--cpus", "1", "build"], "--cpus does not go with build"),
            (["selftest", "--", "true"], "a COMMAND does not go with selftest"),
        ],
    )
    def test_usage(self, call, arguments, message):
        result = call(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr

    def test_help_shows_everything(self, call):
        for arguments in ((), ("--help",)):
            text = call(*arguments).stdout
            assert "pagegate testbed [OPTIONS] -- COMMAND..." in text
            assert all(word in text for word in ("build", "selftest", "--deterministic", "PAGEGATE_TESTBED_KERNEL"))

    def test_build_prints_the_image(self, call, monkeypatch, tmp_path):
        asked = []

        def build(jobs, *, suite, reporter):
            reporter.stage("compiling", 10)
            asked.append((jobs, suite))
            return tmp_path / "bzImage"

        monkeypatch.setattr(builder, "build", build)
        result = call("build", "--jobs", "3", "--suite", "trixie-backports")
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path}/bzImage\n", "compiling\n")
        assert asked == [(3, "trixie-backports")]


APT_CACHE = """#!/bin/sh
case "$*" in
*search*) cat "$FAKE_PACKAGES" ;;
*policy*) echo "pkg:"; echo "  Installed: (none)"; echo "  Candidate: 9.9-1" ;;
esac
"""


class TestSource:
    @pytest.fixture
    def offer(self, tmp_path, monkeypatch):
        """Let apt offer these packages."""
        write_program(tmp_path / "path" / "apt-cache", APT_CACHE)
        monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_PACKAGES", str(tmp_path / "packages"))

        def offer(*packages):
            (tmp_path / "packages").write_text("".join(f"{package} - Linux kernel source\n" for package in packages))

        return offer

    def test_the_preferred_or_the_newest(self, offer):
        offer("linux-source-6.1", "linux-source-7.3", "linux-source-7.12")
        assert builder.choose_source() == kernel.Source("linux-source-7.3", "9.9-1")
        offer("linux-source-6.12", "linux-source-6.1", "linux-source-6.9")
        assert builder.choose_source().package == "linux-source-6.12"
        offer("linux-source-7.9", "linux-source-7.12", "linux-source-6.12")
        assert builder.choose_source().package == "linux-source-7.12"

    def test_none_is_new_enough(self, offer):
        offer("linux-source-6.1")
        with pytest.raises(TestbedError, match=r"apt offers no linux-source of 6\.12 or later: .*--suite"):
            builder.choose_source()

    def test_of_one_series(self, offer):
        offer("linux-source-6.12", "linux-source-7.3")
        assert builder.choose_source(series=(6, 12)).package == "linux-source-6.12"
        with pytest.raises(TestbedError, match=r"apt offers no linux-source-7\.1:"):
            builder.choose_source(series=(7, 1))

    def test_apt_fails(self, offer, tmp_path):
        offer()
        write_program(tmp_path / "path" / "apt-cache", "#!/bin/sh\necho W: hm >&2; echo 'E: no lists' >&2; exit 100\n")
        with pytest.raises(TestbedError, match=r"^apt-cache failed: no lists$"):
            builder.choose_source()

    def test_a_suite_by_its_name(self):
        with pytest.raises(TestbedError, match="no Debian suite"):
            builder.choose_source("http://example.org trixie")


# Stands in for apt-get. The host's package lists are $FAKE_APT/targets; an update with the host's sources gets
# $FAKE_APT/fetched, and one with sources of its own fails if they name an archive that $FAKE_APT/refused lists.
APT_GET = """#!/bin/sh
echo "$*" >>"$FAKE_APT/calls"
lists=$FAKE_APT parts=
for word; do
    case $word in
    Dir::State::Lists=*) lists=${word#*=} ;;
    Dir::Etc::SourceParts=*) parts=${word#*=} ;;
    esac
done
case " $* " in
*" indextargets "*)
    if [ -e "$lists/targets" ]; then cat "$lists/targets"; fi ;;
*" update "*)
    if [ -z "$parts" ]; then
        cp "$FAKE_APT/fetched" "$lists/targets"
    elif [ -e "$FAKE_APT/refused" ] && grep -qFf "$FAKE_APT/refused" "$parts"/*; then
        echo "E: there is no Release file" >&2
        echo "E: The list of sources is of no use" >&2
        exit 100
    fi ;;
*" --print-uris "*)
    echo "'somewhere' linux-source.deb 3000000 SHA256:0" ;;
*" download "*)
    echo deb >linux-source.deb ;;
esac
"""


class TestSuite:
    """A suite that apt is not set up for."""

    @pytest.fixture
    def host(self, tmp_path, monkeypatch):
        """What the stand-ins for apt's programs go by."""
        host = tmp_path / "apt"
        host.mkdir()
        (host / "packages").write_text("linux-source-7.3 - Linux kernel source\n")
        write_program(tmp_path / "path" / "apt-cache", APT_CACHE)
        write_program(tmp_path / "path" / "apt-get", APT_GET)
        monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_PACKAGES", str(host / "packages"))
        monkeypatch.setenv("FAKE_APT", str(host))
        return host

    @staticmethod
    def target(uri: str, entry: object, origin: str = "Debian", component: str = "main") -> str:
        return "\t".join([origin, origin, "deb", "Packages", component, uri.rstrip("/"), uri, str(entry)]) + "\n"

    @staticmethod
    def sources(suite: str = "trixie-backports") -> tuple[str, str]:
        """Name and text of the sources that apt fetched the suite by."""
        (file,) = (kernel.cache_directory() / "apt" / suite / "parts").iterdir()
        return file.name, file.read_text()

    def test_a_line_of_the_sources(self, host):
        entries = host / "debian.list"
        entries.write_text(
            "# a comment\ndeb http://other.test/ubuntu noble main\n"
            "deb  [ arch=amd64 signed-by=/the/key ] http://mirror.test/debian bookworm main contrib # ours\n"
        )
        (host / "targets").write_text(
            self.target("http://other.test/ubuntu/", f"{entries}:2", "Ubuntu")
            + self.target("http://mirror.test/debian/", f"{entries}:3", component="contrib")
            + self.target("http://mirror.test/debian/", f"{entries}:3")
        )
        assert apt.choose_source("trixie-backports") == kernel.Source("linux-source-7.3", "9.9-1")
        assert self.sources() == (
            "archive.list",
            "deb [ arch=amd64 signed-by=/the/key ] http://mirror.test/debian/ trixie-backports main\n",
        )

    def test_a_line_without_options(self, host):
        (host / "debian.list").write_text("deb http://mirror.test/debian bookworm main\n")
        (host / "targets").write_text(self.target("http://mirror.test/debian/", host / "debian.list:1"))
        apt.choose_source("trixie-backports")
        assert self.sources()[1].split() == ["deb", "http://mirror.test/debian/", "trixie-backports", "main"]

    def test_a_stanza_of_the_sources(self, host):
        entries = host / "debian.sources"
        entries.write_text(
            "# Comments are\n\n# no stanzas.\n\n"
            "Enabled: no\nTypes: deb\nURIs: http://first.test/debian\nSuites: bookworm\nComponents: main\n\n\n"
            "Types: deb deb-src\n# a comment\nURIs: http://broken.test/debian\n http://mirror.test/debian\n"
            "Suites: bookworm\n bookworm-updates\nComponents: main contrib\nCheck-Valid-Until: no\n"
            "signed-by:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\n"
            "Types: deb\nURIs: http://third.test/debian\nSuites: x\nComponents: main\nTrusted: yes\n"
        )
        (host / "targets").write_text(self.target("http://mirror.test/debian/", f"{entries}:2"))
        assert apt.choose_source("trixie-backports").package == "linux-source-7.3"
        assert self.sources() == (
            "archive.sources",
            "Types: deb\nURIs: http://mirror.test/debian/\nSuites: trixie-backports\nComponents: main\n"
            "Check-Valid-Until: no\nsigned-by:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n",
        )

    def test_the_host_s_apt_stays_as_it_is(self, host):
        (host / "debian.list").write_text("deb http://mirror.test/debian bookworm main\n")
        (host / "targets").write_text(self.target("http://mirror.test/debian/", host / "debian.list:1"))
        apt.choose_source("trixie-backports")
        (update,) = [call for call in (host / "calls").read_text().splitlines() if call.endswith(" update")]
        own = kernel.cache_directory() / "apt" / "trixie-backports"
        for place in ("Dir::State::Lists=", "Dir::State::Status=", "Dir::Cache=", "Dir::Etc::SourceParts="):
            assert f"-o {place}{own}" in update
        assert "-o Dir::Etc::SourceList=/dev/null" in update
        assert "#clear APT::Update::Post-Invoke;\n" in (own / "apt.conf").read_text()
        assert f"-c {own}/apt.conf " in update

    def test_another_archive_where_the_first_lacks_it(self, host):
        (host / "debian.list").write_text("deb http://a.test/debian sid main\ndeb http://b.test/debian sid main\n")
        (host / "targets").write_text(
            self.target("http://a.test/debian/", host / "debian.list:1")
            + self.target("http://b.test/debian/", host / "debian.list:2")
        )
        (host / "refused").write_text("http://a.test/\n")
        assert apt.choose_source("trixie-backports").package == "linux-source-7.3"
        assert "http://b.test/debian/" in self.sources()[1]

    def test_no_archive_has_it(self, host):
        self.test_another_archive_where_the_first_lacks_it(host)
        (host / "refused").write_text("http://a.test/\nhttp://b.test/\n")
        with pytest.raises(TestbedError) as caught:
            apt.choose_source("trixie-backports")
        assert str(caught.value).splitlines() == [
            "trixie-backports cannot be fetched from any Debian archive that apt's sources name:",
            "  http://a.test/debian: apt-get failed: there is no Release file",
            "  http://b.test/debian: apt-get failed: there is no Release file",
            "name a suite that is there with --suite, add an archive that has trixie-backports to apt's sources, or "
            "build the kernel on another Debian machine and name its image with --kernel or PAGEGATE_TESTBED_KERNEL",
        ]

    def test_the_archive_has_it_without_a_kernel(self, host):
        self.test_another_archive_where_the_first_lacks_it(host)
        (host / "packages").write_text("linux-source-6.1 - Linux kernel source\n")
        message = r"^trixie-backports of http://b.test/debian offers no linux-source of 6\.12 or later: .*--kernel"
        with pytest.raises(TestbedError, match=message):
            apt.choose_source("trixie-backports")

    def test_no_debian_archive(self, host):
        (host / "targets").write_text(self.target("http://other.test/ubuntu/", "/nowhere:1", "Ubuntu"))
        with pytest.raises(TestbedError, match="lists of http://other.test/ubuntu only: .* --kernel or PAGEGATE"):
            apt.choose_source("trixie-backports")

    def test_a_host_that_has_no_lists(self, host):
        (host / "debian.list").write_text("deb http://mirror.test/debian bookworm main\n")
        (host / "fetched").write_text(self.target("http://mirror.test/debian/", host / "debian.list:1"))
        assert apt.choose_source("trixie-backports").package == "linux-source-7.3"
        assert "http://mirror.test/debian/" in self.sources()[1]

    def test_a_host_that_can_get_no_lists(self, host):
        with pytest.raises(TestbedError, match=r"apt can get none \(apt-get update says why\):"):
            apt.choose_source("trixie-backports")
        assert " update" in (host / "calls").read_text()

    @pytest.mark.skipif(shutil.which("xz") is None, reason="needs xz, which unpacks the source")
    def test_the_source_is_downloaded_and_unpacked_once(self, host, tmp_path):
        self.test_a_line_without_options(host)
        (tmp_path / "linux-source-7.3").mkdir()
        (tmp_path / "linux-source-7.3" / "Makefile").write_text("VERSION = 7\n")
        with tarfile.open(tmp_path / "linux-source-7.3.tar.xz", "w:xz") as archive:
            archive.add(tmp_path / "linux-source-7.3", "linux-source-7.3")
        with tarfile.open(tmp_path / "content.tar", "w") as archive:
            archive.add(tmp_path / "linux-source-7.3.tar.xz", "./usr/src/linux-source-7.3.tar.xz")
        write_program(tmp_path / "path" / "dpkg-deb", f'#!/bin/sh\ncat "{tmp_path}/content.tar"\n')
        source = kernel.Source("linux-source-7.3", "9.9-1")
        tree = builder.unpacked_source(source, "trixie-backports", progress.Silent())
        assert (tree / "Makefile").read_text() == "VERSION = 7\n"
        (download,) = [call for call in (host / "calls").read_text().splitlines() if "--quiet download" in call]
        assert f"Dir::State::Lists={kernel.cache_directory()}/apt/trixie-backports/lists" in download
        assert download.endswith(" linux-source-7.3=9.9-1")
        assert builder.unpacked_source(source, "trixie-backports", progress.Silent()) == tree
        assert (host / "calls").read_text().count("--quiet download") == 1

    def test_no_host_is_named_in_the_code(self):
        for file in Path(apt.__file__).parent.iterdir():
            if file.is_file():
                assert "://" not in file.read_text(), file


class TestBuild:
    source = kernel.Source("linux-source-7.3", "7.3.4-1")

    @pytest.fixture
    def make(self, tmp_path, monkeypatch):
        """A stand-in for make, with the source unpacked and chosen. Returns what it was asked to make so far."""
        tree = kernel.cache_directory() / "sources" / self.source.name
        write_program(tree / "scripts/kconfig/merge_config.sh", "#!/bin/sh\n")
        config = "".join(f"CONFIG_{name}=y\n" for name in builder._NEEDED)
        (tmp_path / "config").write_text(config)
        write_image(tmp_path / "image")
        program = f"""#!/bin/sh
            for word; do case $word in O=*) objects=${{word#O=}} ;; esac; done
            echo "$word" >>{tmp_path}/made
            case $word in
            olddefconfig) cp {tmp_path}/config $objects/.config ;;
            bzImage)
                echo '  CC      init/main.o'
                test -e {tmp_path}/fails && {{ echo 'main.c: error: no'; exit 2; }}
                mkdir -p $objects/arch/x86/boot; cp {tmp_path}/image $objects/arch/x86/boot/bzImage ;;
            esac
        """
        write_program(tmp_path / "path" / "make", program)
        monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
        monkeypatch.setattr(builder, "require_tools", lambda: None)
        monkeypatch.setattr(builder, "choose_source", lambda *_: self.source)
        return lambda: (tmp_path / "made").read_text().split() if (tmp_path / "made").exists() else []

    def test_it_builds_once(self, make):
        image = testbed.build()
        assert image == testbed.find_kernel()
        assert make() == ["tinyconfig", "olddefconfig", "bzImage"]
        assert testbed.build() == image
        assert make() == ["tinyconfig", "olddefconfig", "bzImage"]

    def test_a_failed_build_is_none_and_goes_on_where_it_was(self, make, tmp_path):
        (tmp_path / "fails").touch()
        with pytest.raises(TestbedError, match=r"make failed with status 2; .*build\.log ends with:\n.*\n.*error: no"):
            testbed.build()
        with pytest.raises(TestbedError, match="no kernel"):
            testbed.find_kernel()
        (tmp_path / "fails").unlink()
        assert testbed.build() == testbed.find_kernel()
        assert make() == ["tinyconfig", "olddefconfig", "bzImage", "bzImage"]

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_no_compiler_is_left_when_this_process_is_ended(self, name, tmp_path):
        program = (
            "from pathlib import Path; from pagegate.testbed import builder\n"
            f"builder.call(['sh', '-c', 'echo $$ >{tmp_path}/pid; sleep 60'], Path('{tmp_path}/log'))\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
            process.send_signal(getattr(signal, name))
            assert process.wait(timeout=10) != 0
        finally:
            process.kill()
            process.wait()
        wait_for_end(int((tmp_path / "pid").read_text()))

    def test_a_lost_option_is_named(self, make, tmp_path):
        config = (tmp_path / "config").read_text()
        (tmp_path / "config").write_text(config.replace("CONFIG_KVM_SW_PROTECTED_VM=y", "# nothing"))
        with pytest.raises(TestbedError, match="does not grant CONFIG_KVM_SW_PROTECTED_VM, without which"):
            testbed.build()
        assert "bzImage" not in make()

    def test_what_is_needed_is_asked_for(self):
        assert builder.lost_options(kernel.fragment()) == []

    def test_missing_tools_are_named_together(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        for name in builder._PROGRAMS:
            if name not in ("flex", "bison"):
                write_program(tmp_path / "path" / name, "#!/bin/sh\nexit 1\n")
        with pytest.raises(
            TestbedError, match="needs flex, bison, libelf-dev and libssl-dev: apt-get install flex bison"
        ):
            builder.require_tools()
        for name in builder._PROGRAMS:
            write_program(tmp_path / "path" / name, "#!/bin/sh\nexit 0\n")
        with pytest.raises(TestbedError, match="this host has no apt"):
            builder.require_tools()

    def test_without_a_compiler_the_headers_are_named_too(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert builder.missing_packages() == [*builder._PROGRAMS.values(), "libelf-dev", "libssl-dev"]

    def test_progress_without_a_terminal(self, monkeypatch, capsys):
        clock = iter([0.0, 5.0, 25.0, 50.0])
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
        lines = progress.PlainLines(sys.stdout)
        lines.stage("compiling", 100)
        for done in (10, 50, 101):
            lines.reach(done)
        assert capsys.readouterr().out == "compiling\ncompiling: 50 of about 100, 25 s\ncompiling: 101, 50 s\n"

    @pytest.mark.parametrize("name", ["Bars", "Silent"])
    def test_progress_elsewhere(self, name):
        shown = progress.Bars(Progress(disable=True)) if name == "Bars" else progress.Silent()
        shown.stage("compiling", 100)
        shown.reach(10)
        shown.stage("linking")


class TestSelftest:
    @pytest.fixture
    def tests(self, tmp_path, monkeypatch):
        """Stand-ins for the kernel's tests: the first passes, the second fails, the third does not apply."""
        bodies = ["exit 0", "echo first; echo second; exit 254", "echo not here; exit 4"]
        programs = [write_program(tmp_path / f"test_{i}", f"#!/bin/sh\n{body}\n") for i, body in enumerate(bodies)]
        asked = []
        monkeypatch.setattr(selftests, "_programs", lambda series, *_: asked.append(series) or programs)
        return asked

    @pytest.mark.usefixtures("fake_machine")
    def test_outcomes(self, tests):
        seen = []
        outcomes = testbed.selftest(on_outcome=seen.append)
        assert [(one.name, one.result) for one in outcomes] == [
            ("test_0", "passed"),
            ("test_1", "failed"),
            ("test_2", "skipped"),
        ]
        assert outcomes[1].output == "first\nsecond\nexit status 254"
        assert seen == outcomes
        assert tests == [(7, 3)]

    @pytest.mark.usefixtures("fake_machine", "tests")
    def test_one_line_each_and_status_1(self, monkeypatch):
        result = CliRunner().invoke(command, ["selftest"])
        assert result.exit_code == 1
        assert [line.split()[:2] for line in result.stdout.splitlines() if line.startswith("test_")] == [
            ["test_0", "passed"],
            ["test_1", "failed"],
            ["test_2", "skipped"],
        ]
        monkeypatch.setattr(selftests, "selftest", lambda *_, **__: [testbed.Outcome("a", "passed", 1)])
        assert CliRunner().invoke(command, ["selftest"]).exit_code == 0

    @pytest.mark.usefixtures("tests")
    def test_a_machine_that_dies_is_an_error(self, fake_machine, monkeypatch):
        monkeypatch.setenv("FAKE_MODE", "gone")
        with pytest.raises(TestbedError, match="machine ended"):
            testbed.selftest()
        assert fake_machine.exists()


def wait_until(condition) -> None:
    given_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < given_up
        time.sleep(0.02)


def wait_for_end(pid: int) -> None:
    """Wait until this process has ended; one that nobody has collected counts as ended."""

    def ended() -> bool:
        try:
            return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(ended)
