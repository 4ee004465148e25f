"""A rehearsal in real processes: what it measures, and what it leaves behind."""

import dataclasses

from mvd import config
from mvd.rehearsal import rates
from mvd.run_directory import checkpoint_name
from mvd.stage import Execution, Rehearsal, Stage
from tests.runs import curve, read_result, run_cli, small_stage


def rehearsed(stage, **how):
    return dataclasses.replace(stage, execution=dataclasses.replace(stage.execution, rehearsal=Rehearsal(**how)))


def test_a_training_without_weights_and_data_is_measured_and_resumed_on_two_numbers_of_processes(tmp_path):
    planned = small_stage("pretrain", "whole", tmp_path, tmp_path, log_every=4, epochs=6, schedule_epochs=6)
    missing = {"random_weights": ["image_teacher", "video_teacher"], "generated_data": True}
    whole = rehearsed(planned, updates=40, keep_checkpoint=True, **missing)
    finished = run_cli(whole, 2)
    assert finished.code == 0, "\n".join(finished.output)
    assert curve(whole, "update") == [4, 8, 10]  # of the 12 updates, two are left for each resume
    figures = read_result(whole)["rehearsal"]
    assert (figures["gpus"], figures["micro_batch"], figures["gpu"]) == (2, 2, None)
    measured = ["samples_per_second", "memory_gb", "save_seconds", "save_gb", "resume_seconds"]
    assert all(figures[name] > 0 for name in (*measured, "all_reduce_gb_per_second"))
    assert 0 <= figures["data_wait_share"] <= 1 and figures["save_stall_seconds"] <= figures["save_seconds"]
    assert "speed/tflops_per_gpu" not in figures and "speed/mfu" not in figures
    assert whole.files.complete_checkpoints()[-1].name == checkpoint_name(10)

    half = dataclasses.replace(planned, id="half", execution=dataclasses.replace(planned.execution, world_size=1))
    half = rehearsed(half, resume_from=str(whole.directory), **missing)
    finished = run_cli(dataclasses.replace(half, execution=dataclasses.replace(half.execution, accumulation=4)), 1)
    assert finished.code == 0, "\n".join(finished.output)
    assert "resuming after update 10" in finished.output[0] and read_result(half)["rehearsal"]["gpus"] == 1
    for stage in (whole, half):  # nothing large is left
        assert not [path for path in stage.directory.rglob("*") if path.suffix in (".mp4", ".safetensors", ".pt")]
        assert not stage.files.complete_checkpoints()


def test_a_test_reads_a_few_videos_with_a_random_classifier(tmp_path, motion_root):
    recipe = config.Test(size="tiny", dataset="motion", sampling="dense", stride=1, clips=2, crops=1)
    data = config.DatasetPaths(root=str(motion_root))
    how = Execution(runs=str(tmp_path), data=data, workers=0, micro_batch=2, precision="fp32")
    stage = rehearsed(Stage(kind="test", id="test", recipe=recipe, execution=how), random_weights=["finetune"])
    finished = run_cli(stage, 1)
    assert finished.code == 0, "\n".join(finished.output)
    figures = read_result(stage)["rehearsal"]
    assert figures["samples_per_second"] > 0 and figures["gpus"] == 1


def test_rates_leave_the_first_quarter_out(tmp_path):
    stage = small_stage("pretrain", "rates", tmp_path, tmp_path)  # a global batch of 8
    slow = {"update": 10, "samples_per_second": 1.0, "data_wait_share": 1.0}
    measured = [
        {"update": 20, "samples_per_second": 8.0, "data_wait_share": 0.5},
        {"update": 30, "samples_per_second": 4.0, "data_wait_share": 0.2},
        {"update": 40, "samples_per_second": 8.0, "data_wait_share": 0.1},
    ]
    # 10 + 20 + 10 seconds for 240 samples, of which 5 + 4 + 1 waiting
    assert rates([slow, {"update": 10, "val_top1": 1.0}, *measured], stage) == {
        "samples_per_second": 6.0,
        "data_wait_share": 0.25,
    }
