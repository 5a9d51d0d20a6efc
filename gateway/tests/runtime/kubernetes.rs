//! The contract on a real cluster, with the rights that `config/kubernetes` gives a gateway.

use crate::{
    conformance::{Ground, conforms},
    stage::{self, IMAGE, run},
};
use mlad_gateway::{
    config::Config,
    runtime::{Kubernetes, Mount, Runtime as _},
};
use std::{
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

/// The folder of the cluster, and the kubeconfig of a gateway.
fn cluster() -> Option<(PathBuf, PathBuf)> {
    let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let lent = path("MLAD_TEST_CLUSTER").zip(path("MLAD_TEST_KUBECONFIG"));
    if lent.is_none() {
        eprintln!("skipped: MLAD_TEST_CLUSTER is not set (scripts/test kubernetes sets it)");
    }
    lent
}

async fn conforms_with(security: &str, guarded: bool) {
    let (Some(engine), Some(agent), Some((cluster, kubeconfig))) = (stage::engine(), stage::agent(), cluster()) else {
        return;
    };
    bring_image(&engine, &cluster);
    let folder = tempfile::tempdir().unwrap();
    let config = config(&agent, folder.path(), &kubeconfig, security);
    let home = folder.path().join("data/home/alice");
    std::fs::create_dir_all(&home).unwrap();
    chown(&home, Some(20000), Some(20000)).unwrap();
    let runtime = Kubernetes::connect(&config, config.kubernetes.as_ref().unwrap()).await.unwrap();
    let image = format!("registry.invalid/{IMAGE}");
    let pinned = within_a_minute(async || runtime.image_present(&image).await.unwrap()).await;
    let mut spec = stage::alices("w-1-1", pinned);
    spec.mounts = vec![Mount { source: home.clone(), target: "/home/alice".into(), read_only: false }];
    spec.node = Some("localhost".into());
    let no_image = "registry.invalid/mlad-test/none:1";
    conforms(&Ground { runtime: &runtime, spec, home: &home, image: &image, no_image, guarded }).await;
}

/// Brings the tests' image into the cluster, once: what is being read must not be tagged anew.
fn bring_image(engine: &Path, cluster: &Path) {
    static BROUGHT: OnceLock<()> = OnceLock::new();
    BROUGHT.get_or_init(|| {
        stage::import_image(engine);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cluster/import.sh");
        let host = format!("unix://{}", engine.display());
        run(Command::new(script).arg(IMAGE).env("DOCKER_HOST", host).env("RUN", cluster));
    });
}

/// A node tells of its images every few seconds.
async fn within_a_minute<T>(mut question: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(answer) = question().await {
            return answer;
        }
        assert!(tokio::time::Instant::now() < deadline, "no node has the image");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn config(agent: &Path, folder: &Path, kubeconfig: &Path, security: &str) -> Config {
    let text = format!(
        "data_directory = '{0}/data'\nrun_directory = '{0}/run'\ncatalog = '{0}/catalog.toml'\n\
         instance = 't{1}x{security:.1}'\nagent_binary = '{2}'\n\
         [container]\nshared_memory_mib = 8\ngpu_binding = 'environment'\n\
         [kubernetes]\nkubeconfig = '{3}'\nagent_image = 'registry.invalid/mlad/agent:1'\npod_security = '{security}'\n\
         cpu_request_milli = 10\nvolumes = [{{ folder = '{0}/data', host_path = '{0}/data' }}]\n",
        folder.display(),
        std::process::id(),
        agent.display(),
        kubeconfig.display(),
    );
    let path = folder.join("gateway.toml");
    std::fs::write(&path, text).unwrap();
    Config::read(&path).unwrap()
}

#[tokio::test]
async fn kubernetes_conforms_with_an_agent_that_is_root() {
    conforms_with("baseline", true).await;
}

#[tokio::test]
async fn kubernetes_conforms_with_nothing_that_is_root() {
    conforms_with("restricted", false).await;
}
