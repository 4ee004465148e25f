"""TFLOP/s per GPU and MFU, and the cost of probes."""

import dataclasses

import pytest

from mvd.flops import probe_share, tflop_per_sample, throughput, throughput_text
from mvd.monitoring.progress import training_text
from tests.runs import small_stage


def test_mfu_is_a_share_of_the_peak_of_the_gpu(tmp_path):
    recipe = small_stage("pretrain", "p", tmp_path, tmp_path).recipe
    found = throughput(recipe, 100.0, 4, "NVIDIA H100 PCIe")
    assert found["speed/tflops_per_gpu"] == pytest.approx(25 * tflop_per_sample(recipe))
    assert found["speed/mfu"] == pytest.approx(found["speed/tflops_per_gpu"] / 756)


def test_a_gpu_of_unknown_peak_has_no_mfu(tmp_path):
    recipe = small_stage("pretrain", "p", tmp_path, tmp_path).recipe
    for unknown in ("other", "NVIDIA RTX A4000"):
        assert throughput(recipe, 100.0, 4, unknown).keys() == {"speed/tflops_per_gpu"}
    for known in ("NVIDIA GH200 480GB", "NVIDIA A100-SXM4-80GB", "Tesla V100-SXM2-32GB", "NVIDIA A40"):
        assert "speed/mfu" in throughput(recipe, 100.0, 4, known)


def test_each_augmented_copy_of_a_video_is_computed(tmp_path):
    recipe = small_stage("finetune", "f", tmp_path, tmp_path).recipe
    twice = dataclasses.replace(recipe, augmentation=dataclasses.replace(recipe.augmentation, samples=2))
    one, two = (throughput(made, 100.0, 4, "NVIDIA A100")["speed/tflops_per_gpu"] for made in (recipe, twice))
    assert two == pytest.approx(2 * one)


def test_the_cost_of_a_probe_is_spread_over_the_epochs_between_two(tmp_path):
    recipe = small_stage("video_teacher", "v", tmp_path, tmp_path).recipe
    encoder = tflop_per_sample(small_stage("finetune", "f", tmp_path, tmp_path).recipe) / 3
    every = encoder * 20 / (tflop_per_sample(recipe) * 100)
    assert probe_share(recipe, videos=20, samples=100, every_epochs=1) == pytest.approx(every)
    assert probe_share(recipe, videos=20, samples=100, every_epochs=5) == pytest.approx(every / 5)


def test_the_progress_line_has_them_on_gpus_only():
    values = {"loss": 0.5, "samples_per_second": 1024.0}
    assert training_text("1/2", values, "clips") == "epoch 1/2 loss 0.5000 1024.0 clips/s"
    values["speed/tflops_per_gpu"] = 312.4
    assert throughput_text(values) == "312 TFLOP/s a GPU"
    assert training_text("1/2", values | {"speed/mfu": 0.316}, "clips").endswith("clips/s 312 TFLOP/s a GPU (MFU 32 %)")
