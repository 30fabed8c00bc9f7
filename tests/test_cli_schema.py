"""The bounds of values beside their fields, and words that are no value of a flag."""

import pytest

import fine_tuning
import pretrain
from cli.args import parse


@pytest.mark.parametrize(
    "script, words, sentence",
    [
        (pretrain, "--optim.lr 1e9", "--optim.lr should be from 0 to 10, found 1000000000.0"),
        (pretrain, "--optim.lr nan", "--optim.lr should be 0 or more, and finite, found nan"),
        (pretrain, "--optim.betas 0.9 1.5", "--optim.betas should"),
        (pretrain, "--weight_decay 1e6", "--optim.weight_decay should be from 0 to 100, found 1000000.0"),
        (pretrain, f"--seed {2**70}", "--train.seed should be from 0 to 9,223,372,036,854,775,807, found 1180591"),
        (pretrain, "--model.norm_eps 1e30", "norm_eps should be a number from 0 to 1, found 1e+30"),
        (pretrain, "--model.ffn_dim_multiplier 1e308", "ffn_dim_multiplier should be from 0.001 to 1000, found 1e+308"),
        (pretrain, "--model.n_layers 100000", "n_layers should be at most 10,000, found 100000"),
        (pretrain, "--data.batch_size 1000000000000", "--data.batch_size should be from 1 to 10,000,000"),
        (
            pretrain,
            "--init_from m --vocab_multiple_of 100000000000",
            "--vocab_multiple_of should be from 1 to 1,048,576",
        ),
        (pretrain, "--init_from m --vocab_multiple_of 0", "--vocab_multiple_of should be from 1 to 1,048,576, found 0"),
        (fine_tuning, "--data ,", "--data.train should name a file or folder, found ','"),
        (fine_tuning, "--data", "--data.train should name a file or folder for each task, found nothing"),
        (fine_tuning, "--init_from a\0b", "--init_from should name a file or folder, found 'a\\x00b'"),
        (fine_tuning, "--init_from \ud800", "--init_from should be text in UTF-8, found '\\ud800'"),
        (fine_tuning, "--add_tokens a\udc80", "--add_tokens should be text in UTF-8, found 'a\\udc80'"),
        (fine_tuning, "--init_from=", "--init_from should name a file or folder, found ''"),
        (fine_tuning, "--neftune_alpha -1", "--neftune_alpha should be from 0 to 1,000, found -1.0"),
    ],
)
def test_values_out_of_any_sense_are_refused(script, words, sentence):
    with pytest.raises(SystemExit) as refused:
        parse(script.Args, script.__name__, words.split())
    assert refused.value.code.startswith(f"error: {sentence}")
