//! Images: which the engine has, and fetching those it has not.

use super::{
    super::{RuntimeError, StartProgress},
    engine::{Engine, EngineError, QUESTION},
};
use bollard::{models::CreateImageInfo, query_parameters::CreateImageOptionsBuilder};
use futures::StreamExt as _;
use std::{collections::BTreeMap, time::Duration};

/// Longest silence while an image is fetched.
const SILENCE: Duration = Duration::from_secs(300);
/// Most layers whose progress is counted.
const MAX_LAYERS: usize = 1024;

/// The pinned reference of an image that is there.
pub(super) async fn present(engine: &Engine, reference: &str) -> Result<Option<String>, RuntimeError> {
    let name = reference.to_owned();
    match engine.call(QUESTION, |client| async move { client.inspect_image(&name).await }).await {
        Ok(image) => Ok(pin(reference, image.id, &image.repo_digests.unwrap_or_default())),
        Err(error) if error.is_absent() => Ok(None),
        // It is no reference at all.
        Err(EngineError::Refused { status: 400, message }) => Err(cannot_be_had(reference, message)),
        Err(error) => Err(error.into()),
    }
}

/// The pinned reference of an image, which is fetched if it is not there and names a registry.
pub(super) async fn resolve(
    engine: &Engine,
    reference: &str,
    progress: &(dyn Fn(StartProgress) + Send + Sync),
) -> Result<String, RuntimeError> {
    if let Some(pinned) = present(engine, reference).await? {
        return Ok(pinned);
    }
    if !names_registry(reference) {
        // Without a registry's host the engine would take whatever a stranger published under that name.
        return Err(cannot_be_had(
            reference,
            "this machine does not have it and it names no registry; build or load it here, or put the registry's \
             host into its reference"
                .to_owned(),
        ));
    }
    fetch(engine, reference, progress).await?;
    present(engine, reference)
        .await?
        .ok_or_else(|| cannot_be_had(reference, "it was fetched and is not there".to_owned()))
}

async fn fetch(
    engine: &Engine,
    reference: &str,
    progress: &(dyn Fn(StartProgress) + Send + Sync),
) -> Result<(), RuntimeError> {
    tracing::info!(image = %reference, "the image is fetched");
    let client = engine.client().await?;
    let options = CreateImageOptionsBuilder::default().from_image(&with_tag(reference)).build();
    let mut news = client.create_image(Some(options), None, None);
    let mut layers = Layers::default();
    progress(StartProgress::Pulling(0, None));
    loop {
        let next = tokio::time::timeout(SILENCE, news.next())
            .await
            .map_err(|_| cannot_be_had(reference, format!("its registry was silent for {} s", SILENCE.as_secs())))?;
        match next {
            None => return Ok(()),
            Some(Err(error)) => {
                return Err(match engine.failed(error) {
                    EngineError::Refused { message, .. } => cannot_be_had(reference, message),
                    error => error.into(),
                });
            }
            Some(Ok(CreateImageInfo { error_detail: Some(detail), .. })) => {
                return Err(cannot_be_had(reference, detail.message.unwrap_or_default()));
            }
            Some(Ok(info)) => {
                if let Some((done, total)) = layers.count(&info) {
                    progress(StartProgress::Pulling(done, total));
                }
            }
        }
    }
}

/// How much of each layer is there.
#[derive(Debug, Default)]
struct Layers(BTreeMap<String, (u64, Option<u64>)>);

impl Layers {
    /// Bytes so far and in all, if this piece of news changes them. The sum is not known before every layer's
    /// size is.
    fn count(&mut self, info: &CreateImageInfo) -> Option<(u64, Option<u64>)> {
        let id = info.id.as_ref()?;
        let size = |number: Option<i64>| number.and_then(|number| u64::try_from(number).ok()).filter(|size| *size > 0);
        let detail = info.progress_detail.as_ref();
        let total = size(detail.and_then(|detail| detail.total));
        let current = size(detail.and_then(|detail| detail.current)).unwrap_or(0);
        if !self.0.contains_key(id) && self.0.len() >= MAX_LAYERS {
            return None;
        }
        match info.status.as_deref()? {
            "Pulling fs layer" | "Waiting" => {
                self.0.entry(id.clone()).or_default();
            }
            "Downloading" => {
                self.0.insert(id.clone(), (current, total));
            }
            "Download complete" | "Pull complete" | "Verifying Checksum" => {
                let layer = self.0.entry(id.clone()).or_default();
                layer.0 = layer.1.unwrap_or(layer.0);
                layer.1 = Some(layer.0);
            }
            _ => return None,
        }
        let done = self.0.values().map(|(done, _)| done).sum();
        Some((done, self.0.values().map(|(_, total)| *total).sum()))
    }
}

/// The digest in the reference's own repository, or else the engine's id.
fn pin(reference: &str, id: Option<String>, digests: &[String]) -> Option<String> {
    let repository = repository(reference);
    digests.iter().find(|digest| digest.split('@').next() == Some(repository)).cloned().or(id)
}

/// The reference without tag and digest.
fn repository(reference: &str) -> &str {
    let name = reference.split('@').next().unwrap_or(reference);
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => name,
    }
}

/// Without tag and digest the engine would fetch every tag there is.
fn with_tag(reference: &str) -> String {
    if reference.contains('@') || repository(reference) != reference {
        return reference.to_owned();
    }
    format!("{reference}:latest")
}

/// Whether the first part is a host, as the OCI distribution's references have it.
fn names_registry(reference: &str) -> bool {
    reference.split_once('/').is_some_and(|(host, _)| host.contains(['.', ':']) || host == "localhost")
}

fn cannot_be_had(image: &str, reason: String) -> RuntimeError {
    RuntimeError::Image { image: image.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bollard::models::ProgressDetail;

    #[test]
    fn references_are_taken_apart() {
        for (reference, expected, registry) in [
            ("mlad/base:1", "mlad/base", false),
            ("debian", "debian", false),
            ("localhost/a:1", "localhost/a", true),
            ("registry:5000/team/image", "registry:5000/team/image", true),
            ("registry.example.org/team/image:2", "registry.example.org/team/image", true),
            ("registry.example.org/debian@sha256:abc", "registry.example.org/debian", true),
        ] {
            assert_eq!(repository(reference), expected);
            assert_eq!(names_registry(reference), registry, "{reference}");
        }
        assert_eq!(with_tag("registry:5000/team/image"), "registry:5000/team/image:latest");
        assert_eq!(with_tag("a.b/c:1"), "a.b/c:1");
        assert_eq!(with_tag("a.b/c@sha256:abc"), "a.b/c@sha256:abc");
    }

    #[test]
    fn an_image_is_pinned_by_its_own_repositorys_digest_or_by_its_id() {
        let digests = ["other.org/image@sha256:1".to_owned(), "a.org/image@sha256:2".to_owned()];
        let id = Some("sha256:3".to_owned());
        assert_eq!(pin("a.org/image:1", id.clone(), &digests).unwrap(), "a.org/image@sha256:2");
        assert_eq!(pin("mlad/base:1", id, &digests).unwrap(), "sha256:3");
    }

    #[test]
    fn the_sum_is_known_when_every_layer_is() {
        let mut layers = Layers::default();
        let mut say = |id: &str, status: &str, numbers: Option<(i64, i64)>| {
            layers.count(&CreateImageInfo {
                id: Some(id.into()),
                status: Some(status.into()),
                progress_detail: numbers
                    .map(|(current, total)| ProgressDetail { current: Some(current), total: Some(total) }),
                ..CreateImageInfo::default()
            })
        };
        assert_eq!(say("a", "Pulling fs layer", None), Some((0, None)));
        assert_eq!(say("b", "Pulling fs layer", None), Some((0, None)));
        assert_eq!(say("a", "Downloading", Some((10, 100))), Some((10, None)));
        assert_eq!(say("b", "Downloading", Some((5, 50))), Some((15, Some(150))));
        assert_eq!(say("a", "Download complete", None), Some((105, Some(150))));
        assert_eq!(say("a", "Extracting", Some((1, 300))), None);
        assert_eq!(say("b", "Pull complete", None), Some((150, Some(150))));
    }
}
