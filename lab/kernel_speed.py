"""matmul and attention alone, beside what the machine can do: two programs and their lines."""

from pathlib import Path

from common import start

PROGRAMS = ("matmul_bench", "attention_bench")


def measure(programs: list[Path]) -> dict:
    return {program.name: lines(program) for program in programs}


def lines(program: Path) -> list[str]:
    print(f"\n{program.name}", flush=True)
    result = []
    with start(program) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            result.append(line.rstrip())
    if process.returncode != 0:
        raise SystemExit(f"failed: {program}")
    return result
