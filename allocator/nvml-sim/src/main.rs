//! `nvml-sim`: look at a simulated machine, and make things happen on it that no caller of NVML can.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use nvidia_ml_sim::driver::Driver;
use nvidia_ml_sim::machine::{MACHINE_VARIABLE, Machine};
use nvidia_ml_sim::refusal::Refusal;
use nvidia_ml_sim::state::{Device, Fault, FaultKind, Gpu, InstanceKind, Process, State};
use nvidia_ml_sim::{facts::Placement, geometry::compute_profiles};

/// Look at a simulated machine with NVIDIA GPUs, and make things happen on it.
///
/// Every program that loads libnvidia_ml_sim.so with the same machine file sees it at once.
#[derive(Parser)]
#[command(name = "nvml-sim", version, max_term_width = 110)]
struct Arguments {
    /// The machine's description in TOML.
    #[arg(long, env = MACHINE_VARIABLE, value_name = "FILE")]
    machine: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the GPUs, what they are divided into, what runs on them, and the faults to come.
    Show {
        /// The state as it is saved.
        #[arg(long)]
        json: bool,
    },
    /// Reboot the machine: instances and processes are gone, pending MIG modes in force, lost GPUs back.
    Reboot,
    /// Reset one GPU, with the same effect on it; refused while processes run on it, unless it is lost.
    Reset {
        /// Its index.
        gpu: u32,
    },
    /// Make a slice: a GPU instance and a compute instance that takes the whole of it. Prints its UUID.
    Create {
        /// Index of the GPU.
        gpu: u32,
        /// `2g.10gb`, or NVML's number of it.
        profile: String,
        /// First memory slice; where the driver likes if left out.
        #[arg(long)]
        start: Option<u32>,
    },
    /// Destroy a slice: the compute instance, and its GPU instance if nothing else is in it.
    Destroy {
        /// `MIG-…`.
        uuid: String,
    },
    /// Lay faults, or clear them.
    #[command(subcommand)]
    Fault(FaultCommand),
    /// Report a critical error of a GPU to those who wait for events.
    Xid {
        /// Index of the GPU.
        gpu: u32,
        /// The XID.
        code: u64,
        /// Id of the GPU instance it is about.
        #[arg(long, value_name = "ID")]
        gpu_instance: Option<u32>,
    },
    /// Let a GPU count uncorrectable memory errors.
    MemoryErrors {
        /// Index of the GPU.
        gpu: u32,
        /// How many more.
        #[arg(default_value_t = 1)]
        count: u64,
    },
    /// Let processes begin and end to compute.
    #[command(subcommand)]
    Process(ProcessCommand),
}

#[derive(Subcommand)]
enum FaultCommand {
    /// An instance that could be destroyed is "in use" and stays.
    DestroyInUse(Befalls),
    /// A destroy stops half-way: the compute instance goes, its GPU instance is "in use" and stays.
    GpuInstanceLeft {
        /// Index of the GPU; whichever comes first if left out.
        #[arg(long)]
        gpu: Option<u32>,
        /// How often.
        #[arg(long)]
        times: Option<u32>,
    },
    /// An instance that could be created is refused.
    InsufficientResources(Befalls),
    /// A destroy takes its time (until cleared, if --times is left out).
    SlowDestroy {
        #[command(flatten)]
        befalls: Befalls,
        /// How long it takes.
        #[arg(long, default_value_t = 1000)]
        milliseconds: u64,
    },
    /// A GPU falls off the bus until it is reset.
    Lost {
        /// Its index.
        gpu: u32,
    },
    /// Clear the faults laid. (A lost GPU needs a reset.)
    Clear {
        /// Only those of this GPU.
        #[arg(long)]
        gpu: Option<u32>,
    },
}

#[derive(clap::Args)]
struct Befalls {
    /// Index of the GPU; whichever comes first if left out.
    #[arg(long)]
    gpu: Option<u32>,
    /// Which kind of instance; both if left out.
    #[arg(long, value_enum)]
    on: Option<On>,
    /// How often.
    #[arg(long)]
    times: Option<u32>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum On {
    GpuInstance,
    ComputeInstance,
}

#[derive(Subcommand)]
enum ProcessCommand {
    /// A process begins to compute, or holds another amount of memory.
    Start {
        /// Index of an undivided GPU, or the UUID of a GPU or slice.
        device: String,
        /// Its id (need not be that of a real one).
        pid: u32,
        /// Memory it holds on the device.
        #[arg(long, default_value_t = 256)]
        memory_mib: u64,
    },
    /// A process ends.
    Stop {
        /// Its id.
        pid: u32,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("nvml-sim: {error:#}");
            let not_found = matches!(error.downcast_ref(), Some(Refusal::NotFound));
            ExitCode::from(if not_found { 3 } else { 1 })
        }
    }
}

/// Does what is asked for. What there is to print.
fn run(arguments: &Arguments) -> anyhow::Result<String> {
    let driver = Driver::start(Machine::load(&arguments.machine)?)?;
    match &arguments.command {
        Command::Show { json } => return show(&driver, *json),
        Command::Reboot => driver.change(|state| {
            state.reboot();
            Ok(())
        })?,
        Command::Reset { gpu } => {
            driver.change(|state| state.reset_gpu(*gpu)).with_context(|| format!("GPU {gpu} cannot be reset"))?;
        }
        Command::Create { gpu, profile, start } => return create(&driver, *gpu, profile, *start),
        Command::Destroy { uuid } => destroy(&driver, uuid)?,
        Command::Fault(command) => lay_or_clear(&driver, command)?,
        Command::Xid { gpu, code, gpu_instance } => driver
            .change(|state| state.xid(*gpu, *code, *gpu_instance))
            .with_context(|| format!("GPU {gpu} cannot report XID {code}"))?,
        Command::MemoryErrors { gpu, count } => driver
            .change(|state| state.memory_errors(*gpu, *count))
            .with_context(|| format!("GPU {gpu} cannot have memory errors"))?,
        Command::Process(ProcessCommand::Start { device, pid, memory_mib }) => driver
            .change(|state| {
                let device = find_device(state, device)?;
                state.start_process(device, Process { pid: *pid, memory_mib: *memory_mib })
            })
            .with_context(|| format!("process {pid} cannot compute on {device}"))?,
        Command::Process(ProcessCommand::Stop { pid }) => {
            let end = |state: &mut State| if state.end_process(*pid) { Ok(()) } else { Err(Refusal::NotFound) };
            driver.change(end).with_context(|| format!("process {pid} does not compute here"))?;
        }
    }
    Ok(String::new())
}

fn lay_or_clear(driver: &Driver, command: &FaultCommand) -> anyhow::Result<()> {
    let fault = |kind, gpu, times| Fault { kind, gpu, on: None, times, milliseconds: None };
    let befalling = |kind, befalls: &Befalls| {
        let on = befalls.on.map(|on| match on {
            On::GpuInstance => InstanceKind::GpuInstance,
            On::ComputeInstance => InstanceKind::ComputeInstance,
        });
        Fault { on, ..fault(kind, befalls.gpu, befalls.times) }
    };
    let fault = match command {
        FaultCommand::DestroyInUse(befalls) => befalling(FaultKind::DestroyInUse, befalls),
        FaultCommand::GpuInstanceLeft { gpu, times } => fault(FaultKind::GpuInstanceLeft, *gpu, *times),
        FaultCommand::InsufficientResources(befalls) => befalling(FaultKind::InsufficientResources, befalls),
        FaultCommand::SlowDestroy { befalls, milliseconds } => {
            Fault { milliseconds: Some(*milliseconds), ..befalling(FaultKind::SlowDestroy, befalls) }
        }
        FaultCommand::Lost { gpu } => fault(FaultKind::Lost, Some(*gpu), None),
        FaultCommand::Clear { gpu } => {
            return Ok(driver.change(|state| {
                state.clear_faults(*gpu);
                Ok(())
            })?);
        }
    };
    fault.check(driver.state()?.gpus.len()).map_err(anyhow::Error::msg)?;
    Ok(driver.change(|state| {
        state.lay(fault);
        Ok(())
    })?)
}

fn create(driver: &Driver, gpu: u32, profile: &str, start: Option<u32>) -> anyhow::Result<String> {
    let branch = driver.machine().driver_branch();
    let rules = driver.state()?.gpu(gpu).with_context(|| format!("GPU {gpu}"))?.rules(branch)?;
    let Some(its) = rules.profiles().find(|its| its.name == profile || its.id.to_string() == profile) else {
        let known: Vec<&str> = rules.profiles().map(|its| its.name.as_str()).collect();
        bail!("GPU {gpu} has no profile {profile}; it has {}", known.join(", "));
    };
    let whole = compute_profiles(its.compute_slices).into_iter().find(|one| one.slices == its.compute_slices);
    let whole = whole.with_context(|| format!("no compute instance fills {profile}"))?;
    let placement = start.map(|start| Placement { start, size: its.memory_slices });
    let uuid = driver
        .change(|state| {
            let parent = state.create_gpu_instance(gpu, branch, its.id, placement)?;
            let made = state.create_compute_instance(parent, whole.id, None);
            if made.is_err() {
                state.finish_destroy_gpu_instance(parent)?;
            }
            Ok(state.compute_instance(made?)?.compute.uuid.clone())
        })
        .with_context(|| format!("{profile} cannot be made on GPU {gpu}"))?;
    Ok(format!("{uuid}\n"))
}

fn destroy(driver: &Driver, uuid: &str) -> anyhow::Result<()> {
    let (compute, parent, alone) = {
        let state = driver.state()?;
        let Device::Mig(key) = state.device_by_uuid(uuid).with_context(|| uuid.to_owned())? else {
            bail!("{uuid} is a whole GPU, and no slice");
        };
        let instance = state.compute_instance(key)?.parent.instance;
        (key, instance.key, instance.compute.len() == 1)
    };
    driver.destroy_compute_instance(compute).with_context(|| format!("{uuid} cannot be destroyed"))?;
    if alone {
        driver.destroy_gpu_instance(parent).with_context(|| format!("the GPU instance of {uuid} is left"))?;
    }
    Ok(())
}

fn find_device(state: &State, name: &str) -> Result<Device, Refusal> {
    match name.parse() {
        Ok(index) => state.gpu(index).map(|_| Device::Gpu(index)),
        Err(_) => state.device_by_uuid(name),
    }
}

fn show(driver: &Driver, json: bool) -> anyhow::Result<String> {
    let state = driver.state()?;
    if json {
        return Ok(format!("{}\n", serde_json::to_string_pretty(&*state)?));
    }
    let machine = driver.machine();
    let mut text = format!("driver {}, boot {}\n", machine.driver_version, state.boot_id);
    for (index, gpu) in state.gpus.iter().enumerate() {
        text += &show_gpu(index, gpu)?;
    }
    for fault in &state.faults {
        text += &format!("fault to come: {}\n", serde_json::to_string(fault)?);
    }
    Ok(text)
}

fn show_gpu(index: usize, gpu: &Gpu) -> anyhow::Result<String> {
    let mode = match (gpu.mig, gpu.mig_pending) {
        (true, true) => "MIG on",
        (true, false) => "MIG on (off after a reset)",
        (false, false) => "MIG off",
        (false, true) => "MIG off (on after a reset)",
    };
    let lost = if gpu.lost { ", LOST" } else { "" };
    let mut text = format!("GPU {index}  {}  {}  {mode}{lost}\n", gpu.model()?.name, gpu.uuid);
    for process in &gpu.processes {
        text += &format!("  process {}: {} MiB\n", process.pid, process.memory_mib);
    }
    let mut instances: Vec<_> = gpu.instances.iter().zip(gpu.slots()?).collect();
    instances.sort_by_key(|(instance, _)| instance.start);
    for (instance, slot) in instances {
        let last = slot.placement.end().saturating_sub(1);
        let place = if instance.size == 1 { format!("{last}") } else { format!("{}-{last}", instance.start) };
        text += &format!("  {place:>5}  {:<14} GPU instance {}", slot.profile.name, instance.id);
        if instance.compute.is_empty() {
            text += ", empty";
        }
        text.push('\n');
        for compute in &instance.compute {
            let whole = compute.size == slot.profile.compute_slices;
            let part = if whole { String::new() } else { format!(" ({}c)", compute.size) };
            text += &format!("         {}{part}  compute instance {}\n", compute.uuid, compute.id);
            for process in &compute.processes {
                text += &format!("           process {}: {} MiB\n", process.pid, process.memory_mib);
            }
        }
    }
    Ok(text)
}
