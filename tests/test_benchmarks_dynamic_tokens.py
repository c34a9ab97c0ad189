"""The benchmark of stopped patches, at a size where it takes a second."""

import re

from benchmarks import dynamic_tokens


def test_tables(monkeypatch, capsys):
    monkeypatch.setattr(dynamic_tokens, "TURN", 0.001)
    dynamic_tokens.main(["--sides", "96", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "ViT-S, 36 patches" in out
    # Of 36 patches, 60, 40 and 30 % by the spread, and the class token.
    assert "31/25/20/14; 21/17/14/10; 16/13/11/7" in out
    for name in ("1/1/1", "0.8/0.6/0.5", "0.6/0.4/0.3", "packed", "one at a time", "mean"):
        assert re.search(rf"^ +{name} +x\d", out, re.MULTILINE), name


def test_macs_of_the_blocks():
    network = dynamic_tokens.create("s", 64, "cpu", "fp32")
    width, heads = 384, 3 * 16 * 256 * (384 + 19)
    blocks = [12 * t * width**2 + 2 * t * t * width for t in (17, 9, 5, 2)]
    expected = 2 * blocks[0] + 3 * blocks[1] + 3 * blocks[2] + 4 * blocks[3] + heads
    assert dynamic_tokens.macs_of_blocks(network, 16, [9, 5, 2]) == expected
