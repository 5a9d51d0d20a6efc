use super::*;
use crate::runtime::{Found, RuntimeEvent, StartProgress, WorkloadSpec};
use async_trait::async_trait;
use futures::stream::BoxStream;
use mlad::channel::JobResult;
use std::{collections::BTreeMap, time::Duration};
use tokio::net::UnixStream;

/// A runtime that has images and nothing else.
struct Images(BTreeMap<&'static str, &'static str>);

#[async_trait]
impl Runtime for Images {
    async fn start(&self, _: &WorkloadSpec, _: &(dyn Fn(StartProgress) + Send + Sync)) -> Result<(), RuntimeError> {
        Err(RuntimeError::Unavailable("it has images only".into()))
    }
    async fn remove(&self, _: &str, _: Duration) -> Result<(), RuntimeError> {
        Ok(())
    }
    async fn terminate(&self, _: &str) -> Result<(), RuntimeError> {
        Ok(())
    }
    async fn list(&self) -> Result<Vec<Found>, RuntimeError> {
        Ok(Vec::new())
    }
    async fn inspect(&self, _: &str) -> Result<Option<Found>, RuntimeError> {
        Ok(None)
    }
    async fn result(&self, _: &str) -> Result<Option<JobResult>, RuntimeError> {
        Ok(None)
    }
    fn events(&self) -> BoxStream<'static, RuntimeEvent> {
        futures::stream::pending().boxed()
    }
    async fn connect(&self, name: &str) -> Result<UnixStream, RuntimeError> {
        Err(RuntimeError::Gone(name.into()))
    }
    async fn resolve_image(
        &self,
        reference: &str,
        _: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<String, RuntimeError> {
        Err(RuntimeError::Image { image: reference.into(), reason: "it has what it has".into() })
    }
    async fn image_present(&self, reference: &str) -> Result<Option<String>, RuntimeError> {
        Ok(self.0.get(reference).map(|digest| (*digest).to_owned()))
    }
}

const SHIPPED: &str = include_str!("../../../images/catalog.toml");

struct Fixture {
    folder: tempfile::TempDir,
    catalog: Catalog,
}

async fn fixture(text: &str) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("catalog.toml");
    std::fs::write(&path, text).unwrap();
    let store = Store::open(&folder.path().join("gateway.db")).await.unwrap();
    let file = RwLock::new(Arc::new(file::read(&path).unwrap()));
    Fixture { folder, catalog: Catalog { path, file, store } }
}

fn entry(name: &str, reference: &str) -> CatalogEntry {
    CatalogEntry {
        name: name.into(),
        reference: reference.into(),
        description: "a test".into(),
        min_gpu_memory_mib: 0,
        allowed_users: vec![],
    }
}

#[tokio::test]
async fn what_the_engine_has_is_available_and_shows_its_digest() {
    let Fixture { folder: _folder, catalog } = fixture(SHIPPED).await;
    let list = catalog.list(&Images(BTreeMap::from([("mlad/base:1", "sha256:abc")]))).await.unwrap();
    let names: Vec<&str> = list.iter().map(|image| image.name.as_str()).collect();
    assert_eq!(names, ["base", "pytorch", "tensorflow", "jupyter"]);
    assert_eq!((list[0].available, list[0].digest.as_deref()), (true, Some("sha256:abc")));
    assert_eq!((list[1].available, list[1].digest.as_deref()), (false, None));
}

#[tokio::test]
async fn an_unknown_name_is_answered_with_those_there_are() {
    let Fixture { folder: _folder, catalog } = fixture(SHIPPED).await;
    let message = catalog.get("pytroch").await.unwrap_err().to_string();
    assert_eq!(
        message,
        "there is no image pytroch: did you mean pytorch? There are: base, pytorch, tensorflow, jupyter"
    );
    let message = catalog.get("zzz\u{1b}[31m").await.unwrap_err().to_string();
    assert_eq!(message, "there is no image zzz[31m; there are: base, pytorch, tensorflow, jupyter");
}

#[tokio::test]
async fn an_administrator_adds_replaces_hides_and_restores() {
    let Fixture { folder: _folder, catalog } = fixture(SHIPPED).await;
    catalog.add(&entry("mine", "mlad/mine:1")).await.unwrap();
    catalog.add(&entry("base", "mlad/base:2")).await.unwrap();
    assert_eq!(catalog.get("mine").await.unwrap().reference, "mlad/mine:1");
    assert_eq!(catalog.get("base").await.unwrap().reference, "mlad/base:2");
    catalog.remove("base").await.unwrap();
    catalog.remove("mine").await.unwrap();
    assert!(matches!(catalog.get("base").await, Err(ImageError::Unknown { .. })));
    assert!(matches!(catalog.get("mine").await, Err(ImageError::Unknown { .. })));
    assert!(matches!(catalog.remove("mine").await, Err(ImageError::Unknown { .. })));
    catalog.restore("base").await.unwrap();
    assert_eq!(catalog.get("base").await.unwrap().reference, "mlad/base:1");
    assert!(matches!(catalog.restore("base").await, Err(ImageError::Store(StoreError::NotFound { .. }))));
}

#[tokio::test]
async fn what_is_restored_is_of_the_file_and_what_was_added_is_not_lost_by_it() {
    let Fixture { folder: _folder, catalog } = fixture(SHIPPED).await;
    catalog.add(&entry("mine", "mlad/mine:1")).await.unwrap();
    assert!(matches!(catalog.restore("mine").await, Err(ImageError::Unknown { .. })));
    assert!(catalog.get("mine").await.is_ok());
    catalog.add(&entry("base", "mlad/base:2")).await.unwrap();
    assert_eq!(catalog.restore("base").await.unwrap().reference, "mlad/base:1");
    assert_eq!(catalog.get("base").await.unwrap().reference, "mlad/base:1");
}

#[tokio::test]
async fn an_image_for_some_is_unknown_to_others() {
    let text = "[[image]]\nname = 'secret'\nreference = 'lab/secret:1'\ndescription = ''\nallowed_users = ['alice']\n";
    let Fixture { folder: _folder, catalog } = fixture(text).await;
    let names = async |user, role| catalog.entries_for(user, role).await.unwrap().len();
    assert_eq!(names("alice", Role::User).await, 1);
    assert_eq!(names("bob", Role::User).await, 0);
    assert_eq!(names("bob", Role::Admin).await, 1);
    // A newer one is for the same ones.
    catalog.add(&entry("secret", "lab/secret:2")).await.unwrap();
    assert_eq!(catalog.get("secret").await.unwrap().reference, "lab/secret:2");
    assert_eq!((names("alice", Role::User).await, names("bob", Role::User).await), (1, 0));
}

#[tokio::test]
async fn the_file_is_read_again_and_a_broken_one_changes_nothing() {
    let Fixture { folder, catalog } = fixture(SHIPPED).await;
    let path = folder.path().join("catalog.toml");
    std::fs::write(&path, "[[image]]\nname = 'one'\nreference = 'a:1'\ndescription = ''\n").unwrap();
    assert_eq!(catalog.reload().unwrap(), 1);
    assert!(catalog.get("one").await.is_ok());
    std::fs::write(&path, "[[image]]\nname = 'two'\nreferense = 'a:1'\n").unwrap();
    let message = catalog.reload().unwrap_err().to_string();
    assert!(message.contains("line 3") && message.contains("referense"), "{message}");
    assert!(catalog.get("one").await.is_ok());
    for bad in [
        "[[image]]\nname = 'One'\nreference = 'a:1'\ndescription = ''\n",
        "[[image]]\nname = 'one'\nreference = '-v'\ndescription = ''\n",
        "[[image]]\nname = 'one'\nreference = 'a?b'\ndescription = ''\n",
        "[[image]]\nname = 'one'\nreference = 'a/../b'\ndescription = ''\n",
        "[[image]]\nname = 'one'\nreference = 'a'\ndescription = \"two\\nlines\"\n",
        "[[image]]\nname = 'x'\nreference = 'a'\ndescription = ''\n[[image]]\nname = 'x'\nreference = 'b'\ndescription = ''\n",
    ] {
        std::fs::write(&path, bad).unwrap();
        assert!(catalog.reload().is_err(), "{bad}");
    }
}
