//! `mlad-allocator simulate`: how good policies are, as a table or a line of JSON for each.

use anyhow::{Context, anyhow};
use mlad_allocator::{
    placement::Objective,
    simulation::{Experiment, Mode, Outcome, Placer, Shares, Traffic, a100, read_trace},
};
use serde_json::{Map, Value, json};
use std::{fs, io::Write, path::PathBuf};

/// Flags of `mlad-allocator simulate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Flags {
    /// How many GPUs (A100-40GB) there are.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    gpus: u32,
    /// What is asked for: uniform, skew-small, skew-big, bimodal, or six shares for
    /// 7g,4g,3g,2g,1g.10gb,1g.5gb.
    #[arg(long, default_value = "uniform")]
    mix: Shares,
    /// Columns asked for over columns there are [default: 1.0; of a trace, what was recorded].
    #[arg(long, value_parser = load)]
    load: Option<f64>,
    /// How many runs, with seeds from 1; each policy meets the same requests.
    #[arg(long, default_value_t = 20, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    seeds: u64,
    /// Only this policy: first-fit, best-fit, least-fragmentation, expected-loss, expected-room, or
    /// repacking-bound [default: each].
    #[arg(long)]
    policy: Option<Placer>,
    /// What is to be as many as possible: slices or requests.
    #[arg(long, default_value_t)]
    objective: Objective,
    /// What happens to a request for which there is no room: it is lost (`loss`) or waits (`queue`).
    #[arg(long, default_value = "loss", value_parser = mode)]
    mode: Mode,
    /// Requests recorded as pods, instead of a mix: CSV with num_gpu, gpu_milli, creation_time and deletion_time.
    #[arg(long, value_name = "FILE", conflicts_with = "mix")]
    trace: Option<PathBuf>,
    /// A line of JSON for each policy.
    #[arg(long)]
    json: bool,
}

fn load(text: &str) -> Result<f64, String> {
    let load = text.parse::<f64>().ok().filter(|load| (0.01..=100.0).contains(load));
    load.ok_or_else(|| "a load is from 0.01 to 100".to_owned())
}

fn mode(text: &str) -> Result<Mode, String> {
    match text {
        "loss" => Ok(Mode::Loss),
        "queue" => Ok(Mode::Queue),
        _ => Err("the modes are loss, queue".to_owned()),
    }
}

/// Runs the experiment and prints what came of it, policy by policy.
pub(crate) fn run(flags: &Flags) -> anyhow::Result<()> {
    let traffic = match &flags.trace {
        None => Traffic::Random { mix: flags.mix.clone(), load: flags.load.unwrap_or(1.0) },
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            let arrivals = read_trace(&text).map_err(|error| anyhow!("{}: {error}", path.display()))?;
            Traffic::Trace { arrivals, load: flags.load }
        }
    };
    let seeds = if flags.trace.is_some() { 1 } else { flags.seeds };
    let gpus = usize::try_from(flags.gpus)?;
    let experiment = Experiment { gpus, traffic, mode: flags.mode, objective: flags.objective, seeds };
    let placers = flags.policy.map_or_else(Placer::all, |placer| vec![placer]);
    let mut out = std::io::stdout().lock();
    for (nth, placer) in placers.into_iter().enumerate() {
        // Whoever waits in a queue is placed in the end: there is nothing to bound.
        if placer == Placer::Repacking && flags.mode == Mode::Queue {
            continue;
        }
        let outcome = experiment.run(placer);
        if flags.json {
            writeln!(out, "{}", to_json(&experiment, placer, &outcome))?;
        } else {
            if nth == 0 {
                writeln!(out, "{}", heading(&experiment))?;
            }
            writeln!(out, "{}", to_line(&experiment, placer, &outcome))?;
        }
    }
    Ok(())
}

fn to_json(experiment: &Experiment, placer: Placer, outcome: &Outcome) -> Value {
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    let tally = &outcome.tally;
    let mut line = json!({
        "mix": experiment.traffic.name(),
        "gpus": experiment.gpus,
        "load": round(experiment.traffic.load(experiment.gpus)),
        "policy": placer.to_string(),
        "requests": round(tally.requests()),
        "slices": round(tally.slices()),
        "decision_ns": tally.decisions.median(),
    });
    if placer != Placer::Repacking
        && let Some(line) = line.as_object_mut()
    {
        line.insert("utilisation".to_owned(), json!(round(tally.utilisation())));
        line.insert("repartitions".to_owned(), json!(tally.made));
        if experiment.mode == Mode::Queue {
            line.insert("waits".to_owned(), Value::Object(waits(outcome, round)));
        }
    }
    line
}

fn waits(outcome: &Outcome, round: impl Fn(f64) -> f64) -> Map<String, Value> {
    let model = a100();
    let wait = |(index, name): (usize, &str)| {
        let [half, most] = [0.5, 0.95].map(|part| outcome.tally.wait(index, part).map(&round));
        (name.to_owned(), json!({ "p50": half, "p95": most }))
    };
    model.profiles().iter().map(|profile| profile.name.as_str()).enumerate().map(wait).collect()
}

fn heading(experiment: &Experiment) -> String {
    let Experiment { gpus, traffic, seeds, .. } = experiment;
    let what = format!("{gpus} GPUs, {}, load {:.2}, {seeds} seeds\n", traffic.name(), traffic.load(*gpus));
    match experiment.mode {
        Mode::Loss => format!(
            "{what}{:<20} {:>16} {:>16} {:>8} {:>8} {:>8}",
            "policy", "requests %", "slices %", "busy %", "made %", "ns"
        ),
        Mode::Queue => {
            let names: String = a100().profiles().iter().map(|profile| format!(" {:>13}", profile.name)).collect();
            format!("{what}waits p50/p95\n{:<20} {:>8} {:>8} {:>8}{names}", "policy", "busy %", "made %", "ns")
        }
    }
}

fn to_line(experiment: &Experiment, placer: Placer, outcome: &Outcome) -> String {
    let tally = &outcome.tally;
    let made = 100.0 * tally.made as f64 / tally.accepted.max(1) as f64;
    let rest = match placer {
        Placer::Repacking => String::new(),
        Placer::Policy(_) => format!("{:>8.1} {made:>8.1} {:>8}", tally.utilisation(), tally.decisions.median()),
    };
    let name = placer.to_string();
    match experiment.mode {
        Mode::Loss => {
            let requests = with_error(tally.requests(), outcome.by_seed.iter().map(|(requests, _)| *requests));
            let slices = with_error(tally.slices(), outcome.by_seed.iter().map(|(_, slices)| *slices));
            format!("{name:<20} {requests:>16} {slices:>16} {rest}").trim_end().to_owned()
        }
        Mode::Queue => {
            let wait = |index| match (tally.wait(index, 0.5), tally.wait(index, 0.95)) {
                (Some(half), Some(most)) => format!(" {:>13}", format!("{half:.2}/{most:.2}")),
                _ => format!(" {:>13}", "-"),
            };
            format!("{name:<20} {rest}{}", (0..a100().profiles().len()).map(wait).collect::<String>())
        }
    }
}

/// A figure with its standard error over the seeds.
fn with_error(value: f64, by_seed: impl Iterator<Item = f64> + Clone) -> String {
    let number = by_seed.clone().count() as f64;
    if number < 2.0 {
        return format!("{value:.2}");
    }
    let mean = by_seed.clone().sum::<f64>() / number;
    let variance = by_seed.map(|one| (one - mean).powi(2)).sum::<f64>() / (number - 1.0);
    format!("{value:.2} ± {:.2}", (variance / number).sqrt())
}
