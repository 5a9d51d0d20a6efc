//! An installation whose containers are pods of a real cluster, which `scripts/lib/cluster.sh` starts.

use crate::{Outcome, Site};
use std::{
    ops::Deref,
    path::{Path, PathBuf},
    process::Command,
};

/// An installation whose containers are pods.
#[derive(Debug)]
pub struct OnCluster {
    site: Site,
    cluster: PathBuf,
}

impl OnCluster {
    /// On the cluster of `scripts/test kubernetes`, with one simulated node of it.
    ///
    /// # Panics
    /// When there is no cluster.
    pub fn start() -> Self {
        Self::with("")
    }

    /// With further settings of the cluster.
    ///
    /// # Panics
    /// When there is no cluster.
    pub fn with(further: &str) -> Self {
        let path = |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")));
        let (cluster, kubeconfig) = (path("MLAD_TEST_CLUSTER"), path("MLAD_TEST_KUBECONFIG"));
        let settings = format!(
            "kubeconfig = '{}'\nagent_image = 'registry.invalid/mlad/agent:1'\ncpu_request_milli = 50\nschedule_seconds = 20\n\
             volumes = [{{ folder = 'data', host_path = 'data' }}]\n{further}",
            kubeconfig.display()
        );
        let site = Site::builder()
            .setting("kubernetes", &settings)
            .setting("allocator", "node_name = 'localhost'")
            .catalog(
                "[[image]]\nname = 'base'\nreference = 'registry.invalid/mlad/base:1'\ndescription = 'the base'\n\
                 [[image]]\nname = 'none'\nreference = 'registry.invalid/mlad/none:1'\ndescription = 'not there'\n",
            )
            .start();
        Self { site, cluster }
    }

    /// The folder of the cluster: its processes' ids in `pid`, its administrator's kubeconfig.
    pub fn cluster(&self) -> &Path {
        &self.cluster
    }

    /// The installation, to be ended and started.
    pub fn site_mut(&mut self) -> &mut Site {
        &mut self.site
    }

    /// The command `kubectl` as the cluster's administrator, among the workloads.
    pub fn kubectl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(self.cluster.join("admin.kubeconfig")).args(["-n", "mlad"]).args(arguments);
        command
    }

    /// The same, run to its end.
    pub fn kubectl(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(&mut self.kubectl_command(arguments))
    }

    /// Names of its workloads that have a pod, sorted.
    pub fn pods(&self) -> Vec<String> {
        let of_it = format!("mlad.instance={}", self.instance());
        let names = "jsonpath={range .items[*]}{.metadata.labels.mlad\\.workload}{\"\\n\"}{end}";
        let mut names: Vec<String> = self
            .kubectl(&["get", "pods", "-l", &of_it, "-o", names])
            .success()
            .text()
            .lines()
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    }
}

impl Deref for OnCluster {
    type Target = Site;

    fn deref(&self) -> &Site {
        &self.site
    }
}

impl Drop for OnCluster {
    fn drop(&mut self) {
        let of_it = format!("mlad.instance={}", self.instance());
        if std::thread::panicking() {
            eprintln!("{}", self.kubectl(&["describe", "pods", "-l", &of_it]).text());
        }
        self.site.kill_gateway();
        self.kubectl(&["delete", "pods,secrets", "-l", &of_it, "--grace-period=1"]);
    }
}
