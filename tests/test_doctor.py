"""What `medssl doctor` says of a machine."""

import psutil

from medssl import doctor


def test_the_report_has_a_line_for_every_part_of_the_machine():
    text, healthy = doctor.examine()
    kinds = ("python", "packages", "processor", "bfloat16", "cards", "driver", "memory", "disk")
    assert [line.split()[0] for line in text.splitlines()[: len(kinds)]] == list(kinds)
    assert healthy == ("PROBLEM" not in text)


def test_memory_is_that_of_the_container_without_what_the_kernel_gives_back(tmp_path):
    available = psutil.virtual_memory().available
    limit = available // 2
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{limit}\n")  # full, mostly of files
    (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file 1000\ninactive_file {limit // 4}\n")
    assert round(doctor._read_memory_gb(tmp_path) * 1e9) == limit // 4 + 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor._read_memory_gb(tmp_path) * 1e9 > limit
