"""run_translation.py as a process, with the stock Trainer: what it writes, resuming, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.examples.conftest import TINY, Run, Workspace, pair, write_lines

pytestmark = pytest.mark.slow


def results(folder: Path, name: str = "all_results.json") -> dict[str, float]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_trains_evaluates_predicts_and_writes_what_hfs_script_writes(
    workspace: Workspace, run_script: Run, tmp_path: Path
) -> None:
    done = run_script(
        [
            *workspace.arguments(tmp_path / "out"), "--do_train", "--do_eval", "--do_predict",
            "--predict_with_generate", "--predict_before_training", "--max_steps", "3", "--num_beams", "2",
            "--max_train_samples", "48", "--max_eval_samples", "5", "--max_predict_samples", "4",
            "--pad_to_max_length", "--preprocessing_num_workers", "1",
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    everything = results(out)
    assert (everything["train_samples"], everything["eval_samples"], everything["predict_samples"]) == (48, 5, 4)
    assert {"train_loss", "eval_bleu", "predict_bleu", "predict_chrf", "before_bleu"} <= everything.keys()
    for name in ("train", "eval", "predict", "before"):
        assert results(out, f"{name}_results.json").items() <= everything.items()
    assert results(out, "trainer_state.json")["global_step"] == 3
    assert len((out / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()) == 4
    assert "adding 'translate English to Romanian: '" in done.stdout
    # Saved so that it loads: the model, and the tokenizer beside it.
    again = run_script(
        [
            "--model_name_or_path", str(out), "--source_lang", "en", "--target_lang", "ro", "--do_predict",
            "--test_file", str(workspace.files["test"]), "--predict_with_generate", "--num_beams", "2", "--use_cpu",
            "--max_source_length", "32", "--max_target_length", "16", "--max_predict_samples", "4",
            "--pad_to_max_length", "--output_dir", str(tmp_path / "again"),
        ]
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert results(tmp_path / "again")["predict_loss"] == pytest.approx(everything["predict_loss"], rel=1e-5)


def test_resuming_equals_an_uninterrupted_run(workspace: Workspace, run_script: Run, tmp_path: Path) -> None:
    """Automatically from the last checkpoint; --overwrite_output_dir starts anew instead."""
    common = ["--do_train", "--max_steps", "4", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    whole = run_script([*workspace.arguments(tmp_path / "whole"), *common])
    assert whole.returncode == 0, whole.stderr
    first = run_script([*workspace.arguments(tmp_path / "parts"), *common[:1], "--max_steps", "2", *common[3:]])
    assert first.returncode == 0, first.stderr
    second = run_script([*workspace.arguments(tmp_path / "parts"), *common])
    assert second.returncode == 0, second.stderr
    assert "Resuming from" in second.stdout
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "parts" / "model.safetensors")
    assert all((expected[name] == resumed[name]).all() for name in expected)

    anew = run_script([*workspace.arguments(tmp_path / "parts"), *common, "--overwrite_output_dir"])
    assert anew.returncode == 0, anew.stderr
    assert "Resuming from" not in anew.stdout
    restarted = load_file(tmp_path / "parts" / "model.safetensors")
    assert all((expected[name] == restarted[name]).all() for name in expected)


def test_label_smoothing_and_skipped_rows(workspace: Workspace, run_script: Run, tmp_path: Path) -> None:
    rows = [pair("The girl reads.", "Fata citeşte."), pair("", "x"), {"translation": {"en": "alone"}}]
    train = write_lines(tmp_path / "train.json", rows)
    done = run_script(
        [
            *workspace.arguments(tmp_path / "out"), "--do_train", "--max_steps", "1", "--train_file", str(train),
            "--label_smoothing_factor", "0.1", "--normalize_diacritics", "--source_prefix", "",
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 pairs used, 2 rows skipped (1 lack 'en' or 'ro', 1 are empty)" in done.stdout
    # With the cedilla the word would be unknown to the tokenizer, which has only seen the comma below.
    assert "unknown to the tokenizer" not in done.stdout
    assert results(tmp_path / "out")["train_samples"] == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--train_file", "nowhere.json"], "--train_file nowhere.json: no such file"),
        (["--source_lang", "fr"], "no usable row for fr -> ro: 64 lack a language"),
        (["--config_overrides", "d_modle=3"], "Did you mean 'd_model'"),
        (["--deepspeed", "no-launcher.json"], "hf-zero run"),
        (["--tokenizer_name", "t5-small"], "tokenizer 't5-small' cannot be loaded"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(
    workspace: Workspace, run_script: Run, tmp_path: Path, extra: list[str], message: str
) -> None:
    done = run_script([*workspace.arguments(tmp_path / "out"), "--do_train", *extra])
    assert done.returncode == 2, done.stderr
    assert "run_translation.py: error: " in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_hub_dataset_without_network_is_one_message_and_exit_code_two(
    workspace: Workspace, run_script: Run, tmp_path: Path
) -> None:
    arguments = workspace.arguments(tmp_path / "out")
    index = arguments.index("--train_file")
    arguments[index : index + 2] = ["--dataset_name", "wmt16", "--dataset_config", "ro-en"]
    done = run_script([*arguments, "--do_train"], HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stderr
    assert "dataset wmt16 (ro-en), split 'train', cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_our_package_is_not_imported(workspace: Workspace, run_script: Run, tmp_path: Path) -> None:
    """An ordinary Trainer script: a poisoned package on its path is never touched."""
    poison = tmp_path / "poison" / "hf_zero_plugin"
    poison.mkdir(parents=True)
    (poison / "__init__.py").write_text("raise RuntimeError('imported')")
    done = run_script(
        [*workspace.arguments(tmp_path / "out"), "--do_train", "--max_steps", "1"], PYTHONPATH=str(poison.parent)
    )
    assert done.returncode == 0, done.stderr


def test_scores_and_translations_do_not_depend_on_the_number_of_ranks(
    workspace: Workspace, run_script: Run, tmp_path: Path
) -> None:
    """7 rows on 2 ranks in batches of 2: the row that fills up the last batch is neither scored nor written."""
    common = ["--do_predict", "--predict_with_generate", "--max_predict_samples", "7"]
    common += ["--per_device_eval_batch_size", "2", "--config_overrides", f"{TINY},initializer_factor=3"]
    one = run_script([*workspace.arguments(tmp_path / "one"), *common])
    assert one.returncode == 0, one.stderr
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = run_script([*workspace.arguments(tmp_path / "two"), *common], launcher=launcher)
    assert two.returncode == 0, two.stderr
    name = "generated_predictions.txt"
    assert (tmp_path / "two" / name).read_text("utf-8") == (tmp_path / "one" / name).read_text("utf-8")
    for metric in ("predict_chrf", "predict_gen_len", "predict_samples"):
        assert results(tmp_path / "two")[metric] == results(tmp_path / "one")[metric]


@pytest.mark.data
def test_real_text_with_t5s_own_tokenizer(run_script: Run, data_dir: Path, tmp_path: Path) -> None:
    """50 rows of WMT16: long sentences, cedillas, a T5 of true vocabulary."""
    out = tmp_path / "out"
    done = run_script(
        [
            "--config_name", "preset:t5-small", "--tokenizer_name", str(data_dir / "tokenizer_t5"),
            "--config_overrides", "d_model=32,d_ff=64,d_kv=8,num_layers=1,num_heads=4",
            "--source_lang", "en", "--target_lang", "ro",
            "--train_file", str(data_dir / "wmt16_en_ro" / "train.json"), "--max_train_samples", "50",
            "--test_file", str(data_dir / "wmt16_en_ro" / "test.json"), "--max_predict_samples", "8",
            "--do_train", "--do_predict", "--predict_with_generate", "--max_steps", "4", "--normalize_diacritics",
            "--max_target_length", "48", "--val_max_target_length", "16", "--output_dir", str(out), "--use_cpu",
            "--disable_tqdm", "true",
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    everything = results(out)
    assert (everything["train_samples"], everything["predict_samples"]) == (50, 8)
    assert 0 < everything["train_loss"] < 20
    assert "predict_bleu" in everything
