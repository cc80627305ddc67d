"""The flags of a PPO script, in the words of rsl_rl."""


def runner_config(args, std_type: str = "log") -> dict:
    """The configuration of `rsl_rl.runners.OnPolicyRunner` for the Args of one of our PPO scripts."""
    model = {"class_name": "MLPModel", "hidden_dims": list(args.hidden), "obs_normalization": args.norm_obs}
    model |= {"activation": getattr(args, "activation", "elu")}
    gaussian = {"class_name": "GaussianDistribution", "init_std": args.init_std, "std_type": std_type}
    # rsl_rl before 5.5 does not know this setting.
    mixed = {"use_mixed_precision": True} if getattr(args, "precision", "float32") == "bfloat16" else {}
    return {
        "num_steps_per_env": args.num_steps,
        "save_interval": 0,  # read only with a writer
        "torch_compile_mode": "default" if args.compile else None,  # of actor and critic
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": model | {"distribution_cfg": gaussian},
        "critic": model,
        "algorithm": {
            "class_name": "PPO",
            "num_learning_epochs": args.update_epochs,
            "num_mini_batches": args.num_minibatches,
            "clip_param": args.clip_coef,
            "gamma": args.gamma,
            "lam": args.gae_lambda,
            "value_loss_coef": args.vf_coef / 2,  # its value loss has no factor 0.5
            "entropy_coef": args.ent_coef,
            "learning_rate": args.learning_rate,
            "max_grad_norm": args.max_grad_norm,
            "use_clipped_value_loss": args.clip_vloss,
            "schedule": "adaptive" if args.desired_kl else "fixed",
            "desired_kl": args.desired_kl or None,
            "normalize_advantage_per_mini_batch": args.norm_adv,
            **mixed,
        },
    }
