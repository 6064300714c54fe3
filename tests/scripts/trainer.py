"""Fine-tune a tiny language model with transformers' Trainer, on sequences that count upwards."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

set_seed(3)


class Counting(torch.utils.data.Dataset):
    """Item i counts upwards from i, modulo the vocabulary."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        tokens = (index + torch.arange(16)) % 64
        return {"input_ids": tokens, "labels": tokens}


config = LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
model = LlamaForCausalLM(config)

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=16,
            num_train_epochs=4,
            learning_rate=5e-3,
            logging_steps=8,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=3,
        ),
        train_dataset=Counting(),
        eval_dataset=torch.utils.data.Subset(Counting(), range(0, 512, 7)),
    )
    result = trainer.train()
    metrics = trainer.evaluate()

rank, num_ranks = trainer.args.process_index, trainer.args.world_size
print(f"rank {rank} of {num_ranks}: {result.global_step} steps, eval_loss {metrics['eval_loss']:.3f}")
