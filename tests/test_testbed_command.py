"""`pagegate testbed` with stand-ins for the virtual machine, because booting one takes too long here."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from pagegate import testbed
from pagegate.errors import TestbedError
from pagegate.testbed import builder, kernel, machine, selftests
from pagegate.testbed.command import testbed as command

from .testbed_parts import leaves_nothing_behind, own_surroundings, wait_for_end, write_image, write_program

# Stands in for vng and for the machine: runs on this host what the machine would run, without the mounts.
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


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path, monkeypatch):
    own_surroundings(tmp_path, monkeypatch)


@pytest.fixture
def fake_machine(tmp_path, monkeypatch):
    """Replaces vng by the stand-in. Returns the file to which it writes its arguments."""
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
            ({"memory": "lots"}, "memory is .lots.: it must be a whole number"),
            ({"timeout": 0}, "above 0 seconds"),
            ({"timeout": float("nan")}, "timeout is nan"),
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
        assert "--memory 4096M" in fake_machine.read_text()
        assert "icount" not in fake_machine.read_text()
        assert "--append=nohz=off --append=highres=off" in fake_machine.read_text()

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
        leaves_nothing_behind(program, tmp_path / "pid", getattr(signal, name))
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
            (["--memory", "x", "--", "true"], "memory is 'x': it must be a whole number, such as 64"),
            (["--memory", "4", "--", "true"], "it must be a positive multiple of 1 MiB, such as 512M or 4G"),
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
