//! What is asked for, and when.

use super::Mode;
use crate::geometry::{Model, Profile, Resources};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::{f64::consts::TAU, str::FromStr, sync::Arc};

/// A profile: name, number at the driver, columns, compute, MiB, starts.
type Facts = (&'static str, u32, u32, u32, u64, &'static [u32]);

/// The profiles of a mix, largest first.
const PROFILES: [Facts; 6] = [
    ("7g.40gb", 0, 8, 7, 40_192, &[0]),
    ("4g.20gb", 5, 4, 4, 19_968, &[0]),
    ("3g.20gb", 9, 4, 3, 19_968, &[0, 4]),
    ("2g.10gb", 14, 2, 2, 9_856, &[0, 2, 4]),
    ("1g.10gb", 15, 2, 1, 9_856, &[0, 2, 4, 6]),
    ("1g.5gb", 19, 1, 1, 4_864, &[0, 1, 2, 3, 4, 5, 6]),
];

/// Columns of one GPU.
const COLUMNS: f64 = 8.0;

/// At least so many requests before anything is counted, and so many that are: with these the published figures
/// of first fit, best fit and the repacking bound come out.
const WARM_UP: f64 = 1_000.0;
const COUNTED: f64 = 10_000.0;
/// And at least so many mean lives of each: many GPUs take longer to fill.
const LIVES: f64 = 4.0;

/// The standard deviation of the logarithm of a life in a queue: most are short, a few are very long.
const SPREAD: f64 = 1.5;

/// An A100-40GB with its base profiles, as its driver tells them.
pub fn a100() -> Arc<Model> {
    let profile = |(name, id, columns, compute, memory, starts): Facts| {
        let resources = Resources { compute, ..Resources::NONE };
        let most = u32::try_from(starts.len()).unwrap_or(1);
        Profile::new(id, name, columns, memory, most, resources, starts.iter().copied())
    };
    Arc::new(Model::sliced("NVIDIA A100-SXM4-40GB", 40_960, PROFILES.into_iter().filter_map(profile).collect()))
}

/// How often each profile is asked for: shares of `7g 4g 3g 2g 1g.10gb 1g.5gb`.
#[derive(Debug, Clone, PartialEq)]
pub struct Shares {
    /// Its name; `custom` if it has none.
    pub name: String,
    shares: [f64; 6],
}

impl FromStr for Shares {
    type Err = String;

    /// A name, or six shares with commas between, which need not sum to one.
    fn from_str(text: &str) -> Result<Self, String> {
        let shares = match text {
            "uniform" => [1.0; 6],
            "skew-small" => [0.05, 0.10, 0.10, 0.20, 0.25, 0.30],
            "skew-big" => [0.30, 0.25, 0.20, 0.10, 0.10, 0.05],
            "bimodal" => [0.30, 0.15, 0.05, 0.05, 0.15, 0.30],
            _ => {
                let wrong = || {
                    "a mix is uniform, skew-small, skew-big, bimodal, or six shares for 7g,4g,3g,2g,1g.10gb,1g.5gb"
                        .to_owned()
                };
                let shares: Result<Vec<f64>, _> = text.split(',').map(|share| share.trim().parse()).collect();
                let shares: [f64; 6] = shares.map_err(|_| wrong())?.try_into().map_err(|_| wrong())?;
                if shares.iter().any(|share| !(0.0..=1e9).contains(share)) || shares.iter().sum::<f64>() <= 0.0 {
                    return Err(wrong());
                }
                return Ok(Self { name: "custom".to_owned(), shares }.normalised());
            }
        };
        Ok(Self { name: text.to_owned(), shares }.normalised())
    }
}

impl Shares {
    fn normalised(mut self) -> Self {
        let sum: f64 = self.shares.iter().sum();
        self.shares.iter_mut().for_each(|share| *share /= sum);
        self
    }

    /// Columns of one request, on average.
    fn columns(&self) -> f64 {
        self.shares.iter().zip(PROFILES).map(|(share, (_, _, columns, ..))| share * f64::from(columns)).sum()
    }

    /// The profile at this point between 0 and 1.
    fn pick(&self, mut at: f64) -> usize {
        for (profile, share) in self.shares.iter().enumerate() {
            if at < *share {
                return profile;
            }
            at -= share;
        }
        self.shares.iter().rposition(|share| *share > 0.0).unwrap_or(0)
    }
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrival {
    /// When it comes, in mean lives; in seconds if it is recorded.
    pub at: f64,
    /// Index of its profile in [`a100`].
    pub profile: usize,
    /// How long it runs once it is placed.
    pub life: f64,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub enum Traffic {
    /// Poisson arrivals of a mix. The load is the columns that are asked for, over those that there are. Lives
    /// are exponential in a loss system and lognormal in a queue, with mean 1 in both.
    Random {
        /// What is asked for.
        mix: Shares,
        /// How much of it.
        load: f64,
    },
    /// As recorded; with a load, times between arrivals are stretched until it is that.
    Trace {
        /// In order of time.
        arrivals: Arc<[Arrival]>,
        /// The load, if it is not to be the recorded one.
        load: Option<f64>,
    },
}

impl Traffic {
    /// What the mix is called.
    pub fn name(&self) -> &str {
        match self {
            Self::Random { mix, .. } => &mix.name,
            Self::Trace { .. } => "trace",
        }
    }

    /// Columns asked for over columns there are, on `gpus` GPUs.
    pub fn load(&self, gpus: usize) -> f64 {
        match self {
            Self::Random { load, .. } => *load,
            Self::Trace { arrivals, load } => load.unwrap_or_else(|| recorded_load(arrivals, gpus)),
        }
    }

    /// How many requests come before anything is counted.
    pub fn warm_up(&self, gpus: usize) -> usize {
        match self {
            Self::Random { mix, load } => at_least(WARM_UP, LIVES * rate(mix, *load, gpus)),
            Self::Trace { .. } => 0,
        }
    }

    /// The requests of one seed: the same for every policy.
    pub fn arrivals(&self, gpus: usize, mode: Mode, seed: u64) -> Box<dyn Iterator<Item = Arrival> + '_> {
        match self {
            Self::Random { mix, load } => {
                let rate = rate(mix, *load, gpus);
                let number = self.warm_up(gpus) + at_least(COUNTED, LIVES * rate);
                let mut random = StdRng::seed_from_u64(seed);
                let mut at = 0.0;
                Box::new((0..number).map(move |_| {
                    at += exponential(&mut random) / rate;
                    let profile = mix.pick(random.random());
                    let life = match mode {
                        Mode::Loss => exponential(&mut random),
                        Mode::Queue => lognormal(&mut random),
                    };
                    Arrival { at, profile, life }
                }))
            }
            Self::Trace { arrivals, load } => {
                let stretch = load.map_or(1.0, |load| recorded_load(arrivals, gpus) / load);
                Box::new(arrivals.iter().map(move |arrival| Arrival { at: arrival.at * stretch, ..*arrival }))
            }
        }
    }
}

/// Requests in a mean life.
fn rate(mix: &Shares, load: f64, gpus: usize) -> f64 {
    load * COLUMNS * gpus as f64 / mix.columns()
}

fn at_least(least: f64, number: f64) -> usize {
    number.max(least).min(1e9) as usize
}

fn recorded_load(arrivals: &[Arrival], gpus: usize) -> f64 {
    let columns = |profile: usize| PROFILES.get(profile).map_or(0, |profile| profile.2);
    let work: f64 = arrivals.iter().map(|arrival| arrival.life * f64::from(columns(arrival.profile))).sum();
    let (first, last) = (arrivals.first().map_or(0.0, |a| a.at), arrivals.last().map_or(0.0, |a| a.at));
    work / (COLUMNS * gpus as f64 * (last - first).max(f64::MIN_POSITIVE))
}

fn exponential(random: &mut StdRng) -> f64 {
    -(1.0 - random.random::<f64>()).ln()
}

/// Of mean 1.
fn lognormal(random: &mut StdRng) -> f64 {
    let radius = (2.0 * exponential(random)).sqrt();
    let normal = radius * (TAU * random.random::<f64>()).cos();
    (SPREAD * normal - SPREAD * SPREAD / 2.0).exp()
}

/// The requests of a trace of pods: CSV with the columns `num_gpu`, `gpu_milli`, `creation_time` and
/// `deletion_time` among others. Taken are pods with a part of one GPU, each as the smallest profile with as
/// much compute.
///
/// # Errors
/// What is wrong with it, and in which line.
pub fn read_trace(text: &str) -> Result<Arc<[Arrival]>, String> {
    let mut lines = text.lines().enumerate();
    let (_, header) = lines.next().ok_or("the trace is empty")?;
    let column = |name: &str| {
        let at = header.split(',').position(|column| column.trim() == name);
        at.ok_or_else(|| format!("the trace has no column {name}"))
    };
    let columns = [column("num_gpu")?, column("gpu_milli")?, column("creation_time")?, column("deletion_time")?];
    let mut arrivals = Vec::new();
    for (number, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let value = |at: usize| {
            let text = line.split(',').nth(at).unwrap_or_default().trim();
            text.parse::<f64>().map_err(|_| format!("line {}: `{text}` is not a number", number + 1))
        };
        let [gpus, milli, created, deleted] = columns.map(value);
        let (gpus, milli) = (gpus?, milli?);
        if gpus != 1.0 || milli <= 0.0 || milli >= 1000.0 {
            continue;
        }
        // A pod that is not gone when the recording ends has no end: it is not known how long it runs.
        let (Ok(at), Ok(end)) = (created, deleted) else { continue };
        // The smallest share of sevenths that covers it; both 1g profiles have one, the last is the smaller.
        let covers =
            |(_, _, _, compute, ..): &(&str, u32, u32, u32, u64, &[u32])| f64::from(*compute) * 1000.0 >= milli * 7.0;
        let Some(profile) = PROFILES.iter().rposition(covers) else { continue };
        arrivals.push(Arrival { at, profile, life: (end - at).max(0.0) });
    }
    if arrivals.is_empty() {
        return Err("the trace has no pod with a part of one GPU".to_owned());
    }
    arrivals.sort_by(|a, b| a.at.total_cmp(&b.at));
    Ok(arrivals.into())
}
