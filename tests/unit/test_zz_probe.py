from tests.unit.test_real_model import *
def test_x(reference, actor, prompts):
    rows = [prompts[0], prompts[1][:30], prompts[2], prompts[3][:25]]
    first_response_positions = [20, 27, 30, 24]
    tokens_RS = prompt_batch(rows, END_ID, max_length=3)["text"]
    mask_RS = torch.zeros(tokens_RS.size(0), tokens_RS.size(1) - 1)
    for row, (ids, first) in enumerate(zip(rows, first_response_positions, strict=True)):
        mask_RS[row, first - 1 : len(ids) - 1] = 1
    def ref(impl=None):
        logprobs = reference(tokens_RS).logits[:, :-1].log_softmax(dim=-1)
        logprobs = logprobs.gather(-1, tokens_RS[:, 1:, None]).squeeze(-1)
        l = -(logprobs * mask_RS).sum() / mask_RS.sum()
        l.backward()
        g={n:p.grad.clone() for n,p in reference.named_parameters()}
        reference.zero_grad()
        return l.item(), g
    l32,g32=ref()
    reference.double(); reference.model.rotary_emb.inv_freq=reference.model.rotary_emb.inv_freq
    l64,g64=ref()
    reference.float()
    actor.prepare_for_training(); actor.prepare_for_training_step()
    loss,_=actor.get_loss_and_metrics({"response_tokens": tokens_RS, "mask": mask_RS}, forward_only=False)
    print(l32,l64,loss)
    for name, p in actor.model.named_parameters():
        P=lambda g: pack([g[h] for h in hf_names(name)], num_groups=3)
        a,b,c=p.grad,P(g32),P(g64)
        r=lambda x,y: ((x.double()-y.double()).norm()/y.double().norm()).item()
        print(f"{name:60s} ours-hf32 {r(a,b):.1e} ours-64 {r(a,c):.1e} hf32-64 {r(b,c):.1e}")
