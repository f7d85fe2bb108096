import hashlib
import json

import pytest
import torch
from xxhash import xxh3_128

from engine.checkpoint import storage
from engine.checkpoint.hashes import compute_hash, describe_files, matches_hash
from engine.checkpoint.manifest import MANIFEST
from tests.engine.checkpoint.test_pruning import start, train


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 3 * (1 << 20) + 7])
def test_compute_hash_is_the_hash_of_all_bytes(tmp_path, size):
    data = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()
    path = tmp_path / "file"
    path.write_bytes(data)
    assert compute_hash(path) == xxh3_128(data).hexdigest()
    assert compute_hash(path, "sha256") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("bit", [0, 8 * 500 + 3, 8 * 3_000_000 - 1])
def test_file_with_one_flipped_bit_does_not_match_its_hash(tmp_path, bit):
    path = tmp_path / "file"
    data = bytearray(3_000_000)
    path.write_bytes(data)
    [entry] = describe_files([path], tmp_path).values()
    assert matches_hash(path, entry)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    assert not matches_hash(path, entry)


def test_checkpoint_with_sha256_hashes_is_verified_and_loaded(tmp_path):
    train(start(tmp_path, keep=None), 2).destroy()
    place = tmp_path / "global_step2"
    content = json.loads((place / MANIFEST).read_text())
    for name, entry in content["files"].items():
        del entry["xxh3_128"]
        entry["sha256"] = hashlib.sha256((place / name).read_bytes()).hexdigest()
    del content["checksum"]
    (place / MANIFEST).write_text(json.dumps(content))
    trainer = start(tmp_path, keep=None)
    assert trainer.global_steps == 2
    trainer.destroy()
    shard = place / "shard.0.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    [problem] = storage.find_damage(place, storage.read_manifest(place))
    assert problem == "shard.0.safetensors does not match its hash"
