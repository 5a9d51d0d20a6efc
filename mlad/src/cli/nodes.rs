//! `admin node`: machines with GPUs.

use super::{
    Outcome,
    output::{self, Output, ago, or_dash},
};
use crate::{api::NodeInfo, client::Client};
use clap::Subcommand;
use jiff::Timestamp;

/// Machines with GPUs.
#[derive(Debug, Subcommand)]
pub(super) enum NodeCommand {
    /// List them.
    #[command(visible_alias = "list")]
    Ls,
    /// Grant slices of a GPU again that is in quarantine after a critical error (a restart of its machine does so, too).
    Trust {
        /// The GPU's UUID, as `mlad gpu --json` shows it.
        gpu: String,
    },
    /// Forget one that is lost and that nothing is held of any more; its daemon may join again.
    #[command(visible_alias = "remove")]
    Rm {
        /// Its name.
        name: String,
    },
}

pub(super) async fn run(client: &Client, output: &Output, command: NodeCommand) -> Outcome {
    match command {
        NodeCommand::Ls => {
            let now = Timestamp::now();
            output.show(&client.nodes().await?, |list| {
                let rows = list.nodes.iter().map(|node| row(node, now)).collect();
                output::table(["NODE", "STATE", "FOR", "GPUS", "LEASES", "DETAIL"], rows, "no machine has GPUs")
            })
        }
        NodeCommand::Trust { gpu } => {
            client.trust_gpu(&gpu).await?;
            output.done("gpu.trust", &gpu, "trusts the GPU again:")
        }
        NodeCommand::Rm { name } => {
            client.forget_node(&name).await?;
            output.done("node.remove", &name, "forgot the node")
        }
    }
}

fn row(node: &NodeInfo, now: Timestamp) -> [String; 6] {
    [
        node.name.clone(),
        output::word(&node.state),
        or_dash(node.since.map(|since| ago(since, now))),
        node.gpus.to_string(),
        node.leases.to_string(),
        or_dash(node.detail.as_ref()),
    ]
}
