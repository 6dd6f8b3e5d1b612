// Whatever is done to one player is done to the other. Events of media do not bubble, but they are
// seen on their way down.
const both = () => [...element.querySelectorAll('video')];
const other = (one) => both().find((video) => video !== one);
const place = () => element.querySelector('input');
const button = () => element.querySelector('button');
const words = () => {
  const [one] = both();
  if (!one || !button()) return;
  button().textContent = one.paused ? 'Play both' : 'Pause both';
  const frame = Math.round(one.currentTime * Number(place().dataset.fps));
  element.querySelector('output').textContent = `frame ${frame}`;
  if (one.duration) place().value = 1000 * one.currentTime / one.duration;
};
// Players that are being set here, whose seeking is nobody's wish.
const led = new Set();
const set = (video, time) => {
  if (Math.abs(video.currentTime - time) < 0.01) return;
  led.add(video);
  video.currentTime = time;
};
const follow = (event) => {
  const [one, two] = [event.target, other(event.target)];
  if (!two) return;
  const [kind, apart] = [event.type, Math.abs(two.currentTime - one.currentTime)];
  if (kind === 'seeking' && !led.delete(one)) set(two, one.currentTime);
  if (kind === 'play' && two.paused) { set(two, one.currentTime); two.play(); }
  if (kind === 'pause' && !two.paused && !one.ended) { two.pause(); set(two, one.currentTime); }
  if (kind === 'timeupdate' && one === both()[0] && apart > 0.15 && !two.seeking) {
    set(two, one.currentTime);
  }
  words();
};
for (const kind of ['play', 'pause', 'seeking', 'timeupdate']) {
  element.addEventListener(kind, follow, true);
}
element.addEventListener('click', (event) => {
  if (!event.target.closest('.ga-controls button')) return;
  const [one] = both();
  if (one.paused) both().forEach((video) => video.play()); else both().forEach((v) => v.pause());
});
element.addEventListener('input', (event) => {
  if (event.target !== place()) return;
  for (const video of both()) video.currentTime = video.duration * event.target.value / 1000;
});
