//! Random operations on an image of each format against a model in memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::disk::{Disk, Format, Image, check};
use tidegate::model::Extent;
use tidegate::storage::AlignedBuf;
use tidegate::storage::uring::{self, Uring};

const SIZE: u64 = 9 << 20;

fuzz_target!(|data: &[u8]| {
    let Some((&first, operations)) = data.split_first() else { return };
    let formats: Vec<Format> = Format::ALL.into_iter().filter(|f| f.can_be_replica()).collect();
    let format = formats[usize::from(first) % formats.len()];
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let path = dir.path().join("image");
    let mut model = vec![0u8; SIZE as usize];
    uring::run(async {
        let mut image = Image::create(&Uring::buffered(), &path, format, SIZE).await.expect("made");
        for op in operations.chunks_exact(4).take(64) {
            let offset = u64::from(u16::from_le_bytes([op[0], op[1]])) % (SIZE / 512) * 512;
            let extent = Extent::new(offset, ((u64::from(op[2]) + 1) * 512 * 8).min(SIZE - offset));
            let target = &mut model[extent.offset as usize..extent.end() as usize];
            match op[3] % 8 {
                0 => image.barrier().await.expect("barrier"),
                1 => {
                    image.finish().await.expect("finished");
                    image = Image::open(&Uring::buffered(), &path, format).await.expect("opened");
                }
                2 => {
                    image.zero(extent).await.expect("zeroed");
                    target.fill(0);
                }
                value => {
                    target.fill(value | op[0]);
                    image.write(extent.offset, AlignedBuf::copy_of(target).freeze()).await.expect("written");
                }
            }
        }
        assert!(image.read(Extent::new(0, SIZE)).await.expect("read")[..] == model[..]);
        image.finish().await.expect("finished");
        assert!(check::image(&Uring::buffered(), &path, format, None).await.expect("checked").is_good());
    })
    .expect("a ring");
});
