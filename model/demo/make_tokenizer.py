"""Makes the demo's tokenizer: a byte-level BPE of about 500 tokens, with the special ids of the published one.

    python -m model.demo.make_tokenizer

It is trained on a list of the demo's words, not on sentences: trained on whole sentences, BPE would make one token of
"左上角有一个大的红色的圆形" and hide its words from the language model.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset import demo
from model.errors import run_script

FOLDER = Path(__file__).parent
SENTENCE_WORDS = """
    user assistant 图形 图片 颜色 形状 位置 什么 哪里 几个 多少 多大 没有 有没有 一共 一个 图中 画面 怎样 第一 第二 两张 不同
    描述 说明 内容 看图 说话 位于 是 有 在 的 吗 还是 大的 小的 变成 移到 去掉 加 把 空 这张 请 里 零个 两个 三个 大 小 ， 。 ？ ； ：
"""
WORDS = [*SENTENCE_WORDS.split(), *demo.COLOURS, *demo.SHAPES, *demo.PLACES]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<s>user\\n' + message['content'] + '</s>\\n<s>assistant\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>\\n' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def main():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # more than needed, so that every word becomes a token
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(FOLDER)
    print(f"{len(fast)} tokens in {FOLDER}")


if __name__ == "__main__":
    run_script(main)
