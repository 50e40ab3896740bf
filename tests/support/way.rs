//! Ways from process servers to the master target that can be cut, without namespaces.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::Cluster;

/// A way for datagrams that can be cut.
pub struct Way {
    port: u16,
    cut: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
}

impl Way {
    /// From each process server of a cluster that is prepared and not started to the master target.
    pub fn between(cluster: &Cluster) -> Vec<Self> {
        let forward = cluster.forward_port();
        let place = |role: String| {
            let way = Self::to(forward);
            let text = std::fs::read_to_string(cluster.config(&role)).expect("a configuration");
            let (from, to) = (format!("master_target = \"127.0.0.1:{forward}\""), format!("master_target = \"127.0.0.1:{}\"", way.port));
            assert!(text.contains(&from), "{role} is configured otherwise");
            std::fs::write(cluster.config(&role), text.replace(&from, &to)).expect("a configuration");
            way
        };
        cluster.gateway_roles().map(place).collect()
    }

    /// To a port of this machine.
    fn to(port: u16) -> Self {
        let (front, back) = (UdpSocket::bind("127.0.0.1:0").expect("loopback"), UdpSocket::bind("127.0.0.1:0").expect("loopback"));
        back.connect(("127.0.0.1", port)).expect("loopback");
        let way = Self { port: front.local_addr().expect("loopback").port(), cut: Arc::default(), over: Arc::default() };
        let client = Arc::new(Mutex::new(None));
        for there in [true, false] {
            let (front, back) = (front.try_clone().expect("loopback"), back.try_clone().expect("loopback"));
            let (cut, over, client) = (way.cut.clone(), way.over.clone(), client.clone());
            front.set_read_timeout(Some(Duration::from_millis(100))).expect("loopback");
            back.set_read_timeout(Some(Duration::from_millis(100))).expect("loopback");
            std::thread::spawn(move || {
                let mut packet = [0; 65536];
                while !over.load(Ordering::Relaxed) {
                    let got = if there {
                        front.recv_from(&mut packet).map(|(len, from)| (len, Some(from)))
                    } else {
                        back.recv(&mut packet).map(|len| (len, None))
                    };
                    // An error is a timeout, or a port that nobody listens on just now.
                    let Ok((len, from)) = got else { continue };
                    let to = {
                        let mut client = client.lock().expect("loopback");
                        *client = from.or(*client);
                        *client
                    };
                    if cut.load(Ordering::Relaxed) {
                        continue;
                    }
                    let _ = if there { back.send(&packet[..len]) } else { to.map_or(Ok(0), |to| front.send_to(&packet[..len], to)) };
                }
            });
        }
        way
    }

    /// Nothing passes, or everything does.
    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
