//! `project` and `admin project`: people who share a quota.

use super::{
    Outcome,
    admin::UserName,
    completion,
    forwarding::{self, ForwardingArguments, Whose},
    jobs::parse_mib,
    output::{self, Output, memory, or_dash},
};
use crate::{
    api::{NewProject, Project, ProjectLimits},
    client::Client,
};
use clap::{Args, Subcommand, builder::ValueParser};
use clap_complete::ArgValueCandidates;

/// The caller's projects.
#[derive(Debug, Subcommand)]
pub(super) enum ProjectCommand {
    /// List those you are a member of.
    Ls,
    /// Say what your jobs count for that name no project; without a name: nothing.
    Default {
        /// The project.
        #[arg(add = ArgValueCandidates::new(completion::projects))]
        project: Option<String>,
    },
}

/// Projects, for administrators.
#[derive(Debug, Subcommand)]
pub(super) enum AdminProjectCommand {
    /// List them.
    #[command(visible_alias = "list")]
    Ls,
    /// Make one, without members and limits.
    Add {
        /// Its name.
        name: String,
        /// The project it lies in, whose limits hold for it too.
        #[arg(long, value_name = "PROJECT")]
        parent: Option<String>,
    },
    /// Show one.
    Show(ProjectName),
    /// Remove one that no other lies in; what runs goes on, and its queued jobs are held.
    #[command(visible_alias = "remove")]
    Rm(ProjectName),
    /// Change what its members may hold together; a limit left out is no limit.
    Quota(LimitArguments),
    /// Show or change what its members may forward over SSH, wherever they are; what is left out stays.
    Forwarding {
        #[command(flatten)]
        project: ProjectName,
        #[command(flatten)]
        forwarding: ForwardingArguments,
    },
    /// Its members.
    #[command(subcommand)]
    Member(MemberCommand),
}

/// A project's name.
#[derive(Debug, Args)]
pub(super) struct ProjectName {
    /// Its name.
    name: String,
}

/// Limits of a project.
#[derive(Debug, Args)]
pub(super) struct LimitArguments {
    #[command(flatten)]
    project: ProjectName,
    /// Slices and whole GPUs at once.
    #[arg(long)]
    slices: Option<u32>,
    /// GPU memory at once: 80G, or a number of MiB.
    #[arg(long, value_parser = ValueParser::new(parse_gpu_memory), value_name = "MEMORY")]
    gpu_memory: Option<u64>,
    /// Hours of whole GPUs in 30 days.
    #[arg(long, value_name = "HOURS")]
    gpu_hours: Option<u64>,
}

/// Members of a project.
#[derive(Debug, Subcommand)]
pub(super) enum MemberCommand {
    /// Make somebody a member.
    Add {
        /// The project.
        project: String,
        #[command(flatten)]
        user: UserName,
    },
    /// End a membership; what runs goes on, and queued jobs for the project are held.
    #[command(visible_alias = "remove")]
    Rm {
        /// The project.
        project: String,
        #[command(flatten)]
        user: UserName,
    },
}

pub(super) async fn run(client: &Client, output: &Output, command: ProjectCommand) -> Outcome {
    match command {
        ProjectCommand::Ls => output.show(&client.projects().await?, |list| {
            let mut text = table(&list.projects, "you are a member of no project");
            if let Some(default) = &list.default {
                text += &format!("jobs that name no project count for {default}\n");
            }
            text
        }),
        ProjectCommand::Default { project } => {
            let project = project.filter(|project| project != Project::NONE);
            output.say(&client.set_default_project(project).await?, |set| match &set.project {
                Some(project) => format!("jobs that name no project count for {project} from now on"),
                None => "jobs that name no project count for none from now on".into(),
            })
        }
    }
}

pub(super) async fn administer(client: &Client, output: &Output, command: AdminProjectCommand) -> Outcome {
    match command {
        AdminProjectCommand::Ls => output.show(&client.all_projects().await?, |list| {
            table(&list.projects, "no projects: mlad admin project add NAME")
        }),
        AdminProjectCommand::Add { name, parent } => {
            let project = client.add_project(&NewProject { name, parent }).await?;
            output.say(&project, |project| {
                let name = &project.name;
                format!("added {name}; `mlad admin project member add {name} USER` makes somebody a member")
            })
        }
        AdminProjectCommand::Show(project) => {
            output.show(&client.project(&project.name).await?, |project| table(std::slice::from_ref(project), ""))
        }
        AdminProjectCommand::Rm(project) => {
            client.remove_project(&project.name).await?;
            output.done("project.remove", &project.name, "removed")
        }
        AdminProjectCommand::Quota(LimitArguments { project, slices, gpu_memory, gpu_hours }) => {
            let gpu_seconds = gpu_hours.map(|hours| hours.saturating_mul(3600));
            let limits = ProjectLimits { slices, gpu_memory_mib: gpu_memory, gpu_seconds };
            let project = client.set_project_limits(&project.name, &limits).await?;
            output.say(&project, |project| format!("changed the limits of {}", project.name))
        }
        AdminProjectCommand::Forwarding { project, forwarding } => {
            forwarding::run(client, output, Whose::Project(&project.name), &forwarding).await
        }
        AdminProjectCommand::Member(MemberCommand::Add { project, user }) => output
            .say(&client.add_member(&project, &user.name).await?, |project| {
                format!("{} is a member of {}", user.name, project.name)
            }),
        AdminProjectCommand::Member(MemberCommand::Rm { project, user }) => {
            client.remove_member(&project, &user.name).await?;
            output.done("project.member.remove", &user.name, "ended the membership of")
        }
    }
}

/// Used and limit in one cell: `1 of 2`.
fn used_of(used: Option<String>, limit: Option<String>) -> String {
    match (used, limit) {
        (Some(used), Some(limit)) => format!("{used} of {limit}"),
        (Some(used), None) => used,
        (None, limit) => limit.map_or_else(|| "?".into(), |limit| format!("? of {limit}")),
    }
}

fn table(projects: &[Project], empty: &str) -> String {
    let rows = projects.iter().map(|project| {
        let Project { limits, used, .. } = project;
        [
            project.name.clone(),
            or_dash(project.parent.as_ref()),
            used_of(used.map(|used| used.slices.to_string()), limits.slices.map(|slices| slices.to_string())),
            used_of(used.map(|used| memory(used.gpu_memory_mib)), limits.gpu_memory_mib.map(memory)),
            used_of(used.map(|used| gpu_hours(used.gpu_seconds)), limits.gpu_seconds.map(gpu_hours)),
            if project.members.is_empty() { "-".into() } else { project.members.join(" ") },
        ]
    });
    output::table(["NAME", "WITHIN", "SLICES", "GPU MEMORY", "GPU HOURS", "MEMBERS"], rows.collect(), empty)
}

/// GPU time in hours.
pub(super) fn gpu_hours(seconds: u64) -> String {
    format!("{}.{}", seconds / 3600, seconds % 3600 / 360)
}

/// `80G`, or a number of MiB.
pub(super) fn parse_gpu_memory(text: &str) -> Result<u64, String> {
    text.parse().or_else(|_| parse_mib(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpu_memory_and_hours_read_and_are_shown() {
        assert_eq!(parse_gpu_memory("80G"), Ok(81_920));
        assert_eq!(parse_gpu_memory("20000"), Ok(20_000));
        assert!(parse_gpu_memory("80X").is_err());
        assert_eq!((gpu_hours(0), gpu_hours(5400)), ("0.0".into(), "1.5".into()));
        assert_eq!(used_of(Some("1".into()), Some("2".into())), "1 of 2");
        assert_eq!(used_of(None, Some("2".into())), "? of 2");
    }
}
