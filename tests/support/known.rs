//! Points and what the disk held when they were made, to be compared with what is brought back.

use std::path::PathBuf;
use std::time::Duration;

use super::writer::Writer;
use super::{Cluster, same_bytes};

/// Points of disk 0.
#[derive(Default)]
pub struct Known(pub Vec<(String, PathBuf)>);

impl Known {
    /// Makes a point while the writer rests; it is listed some time later.
    pub fn mark(&mut self, cluster: &Cluster, writer: &Writer, label: &str) {
        writer.pause();
        self.mark_at_rest(cluster, label);
        writer.go_on();
    }

    /// The same, of a disk that nobody writes.
    pub fn mark_at_rest(&mut self, cluster: &Cluster, label: &str) {
        let point = cluster.mark_unlisted(label);
        let model = cluster.path(&format!("{label}.model"));
        std::fs::copy(cluster.disk(0), &model).expect("a copy");
        self.0.push((point, model));
    }

    /// Every one of them is listed and exact. The number.
    pub fn check(&self, cluster: &Cluster) -> usize {
        for (point, model) in &self.0 {
            cluster.wait(&format!("point {point} is listed"), Duration::from_secs(60), || {
                cluster.points().iter().any(|p| p["id"] == point.as_str())
            });
            let out = cluster.path("out.raw");
            cluster.export(point, 0, "raw", &out);
            assert!(same_bytes(&out, model), "point {point} ({}) is not exact", model.display());
            std::fs::remove_file(&out).expect("ours");
        }
        self.0.len()
    }
}
