"""Logs: readable by people or machines, and never a secret."""

import json

import pytest

from meshmax.telemetry import log


def test_secrets_are_replaced_whoever_logs_them(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", json_lines=True)
    log.get_logger("x").info("hello", token="abc123", prompt="my diary", peer="12D3")
    line = json.loads(capsys.readouterr().err)
    assert line["token"] == line["prompt"] == "***"
    assert line["peer"] == "12D3"
    assert line["component"] == "x"
    log.configure("error", json_lines=False)


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("warning", json_lines=True)
    log.get_logger("x").info("hello")
    assert capsys.readouterr().err == ""
    log.configure("error", json_lines=False)
