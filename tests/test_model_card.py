"""NEFTune's section in the model card."""

from neftune_hf.model_card import add_to_card

from .helpers import MixedTrainer, make, train

CARD = "---\ntags: [mine]\n---\n# Model\n\n## NEFTune\n\nold\n\n## Mine\n\nkept\n"


def test_a_card_keeps_the_users_sections_and_one_that_cannot_be_read_ends_no_run(tmp_path, caplog):
    trainer = make(tmp_path, MixedTrainer, alpha=5)
    train(trainer)
    run, file = trainer.neftune_callback.run, tmp_path / "README.md"
    file.write_text(CARD)
    for _ in range(2):
        add_to_card(file, run)
        text = file.read_text()
        assert text.count("## NEFTune") == 1
        assert "## Mine\n\nkept" in text
        assert "old" not in text
        assert "- mine" in text
        assert "- neftune" in text
    file.write_text("---\ntags: [\n---\n")
    add_to_card(file, run)
    assert file.read_text() == "---\ntags: [\n---\n"
    assert "cannot read the model card" in caplog.text
