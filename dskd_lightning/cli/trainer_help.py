"""The settings of ``dskd fit`` that most runs name, without the seconds that reading all of them takes."""

__all__ = ["TRAINER_HELP"]

TRAINER_HELP = """usage: dskd {command} [--config FILE ...] [--KEY VALUE ...]

A config is a YAML file or dskd:NAME (`dskd config list`). Later ones lie over
earlier ones, options over both.

the run
  --output FOLDER                     checkpoints, logs, results
  --ckpt_path last                    go on where that run stopped; to evaluate: best or a file
  --overwrite true                    start over in a used folder
  --seed_everything NUMBER            of initialisation, shuffling and dropout (42)
  --save_every_n_steps NUMBER         optimiser steps between checkpoints to resume from (100)

models: a Hub id, a folder, a GGUF file, or demo
  --model.student.source NAME
  --model.student.lora.rank NUMBER    low-rank adapters; without them all weights are trained
  --model.student.prune.layers NUMBER keep so many of the decoder's layers
  --model.student.tokenizer NAME      another tokenizer than the model's own
  --model.teacher.source NAME
  --model.teacher.quantization 4bit   or 8bit, by bitsandbytes
  --model.teacher.adapter FOLDER      of peft, merged into the teacher

what is minimised, and how
  --model.objective CLASS             such as dskd_lightning.objectives.DSKDObjective
  --model.objective.kd_ratio NUMBER   share of distillation in the loss (0.5)
  --model.objective.temperature NUMBER
  --model.optimizer CLASS             such as torch.optim.AdamW
  --model.optimizer.lr NUMBER
  --model.projector_lr NUMBER         learning rate of projectors (1e-3)
  --model.warmup_ratio NUMBER         share of the steps (0.1), then a cosine

data: files, folders, Hub datasets or demo
  --data.train NAME                   likewise --data.val, --data.test and --data.predict
  --data.val_split NUMBER             examples, or a share, to hold out; also --data.test_split
  --data.max_length NUMBER            tokens of prompt and response
  --data.max_prompt_length NUMBER     tokens of the prompt
  --data.batch_size NUMBER            sequences of each device
  --data.teacher_cache.dtype TYPE     keep the teacher's states: bfloat16, int8, int4

the trainer, which is Lightning's
  --trainer.max_epochs NUMBER
  --trainer.max_steps NUMBER          optimiser steps
  --trainer.accumulate_grad_batches NUMBER
  --trainer.precision bf16-mixed
  --trainer.devices NUMBER            several: --config dskd:strategy/ddp or dskd:strategy/fsdp2

evaluation
  --model teacher                     evaluate the teacher in the student's place
  --responses.seeds [10,20,30,40,50]  seeds of sampled responses in `test`; [] decodes greedily
  --responses.max_new_tokens NUMBER
  --completions.prompts NUMBER        prompts whose responses validation shows

`dskd {command} --print_config` prints every setting with its value,
`dskd {command} --help-all` explains all of them.
"""
