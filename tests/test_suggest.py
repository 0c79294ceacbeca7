import pytest

from m2_plugin.suggest import check_keys, did_you_mean


def test_the_closest_name_is_proposed():
    assert did_you_mean("colla", ["cola", "sst2"]) == " Did you mean 'cola'?"
    assert did_you_mean("xyzzy", ["cola", "sst2"]) == ""
    assert did_you_mean(19, ["cola"]) == ""  # a YAML's key may be a number


def test_an_unknown_key_is_named_with_its_section_and_the_known_ones():
    check_keys({"lr": 1}, {"lr", "seed"}, "optimizer")
    message = r"^Unknown key 'sed' in optimizer\. Did you mean 'seed'\? Known keys: lr, seed\.$"
    with pytest.raises(ValueError, match=message):
        check_keys({"sed": 1}, {"seed", "lr"}, "optimizer")
